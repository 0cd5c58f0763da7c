"""The recipe room: every named recipe is whole, and a slip in a field is refused with the range that holds."""

import json
import math
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import recipe
from helpers.augment import STAGES
from helpers.model import count_parameters
from helpers.recipe import RECIPES, Recipe
from helpers.runtime import CourseError

# What the course promises for each number: (lowest, highest), both allowed, written here a second time on purpose.
WHOLE = {
    "seed": (0, 2**31 - 1),
    "width": (8, 512),
    "reduction": (0, 256),
    "epochs": (1, 5_000),
    "batch_size": (2, 16_384),
    "warmup_epochs": (0, 1_000),
    "train_size": (10, 45_000),
    "val_size": (10, 25_000),
    "split_seed": (0, 2**31 - 1),
    "stem_stride": (1, 2),
}
REAL = {
    "dropout": (0.0, 0.95),
    "learning_rate": (1e-6, 10.0),
    "momentum": (0.0, 0.999),
    "weight_decay": (0.0, 0.1),
    "strength": (0.0, 2.0),
    "mixup_alpha": (0.0, 10.0),
    "consistency": (0.0, 100.0),
    "drop_path": (0.0, 0.95),
    "clip_norm": (0.0, 1_000.0),
    "label_smoothing": (0.0, 0.5),
    "sam_rho": (0.0, 2.0),
    "ema_decay": (0.0, 0.99999),
    "cutmix_alpha": (0.0, 10.0),
}
NUMBERS = WHOLE | REAL


def refused(field, value):
    """The sentence with which a value of a field is refused."""
    with pytest.raises(CourseError) as caught:
        Recipe("x", **{field: value})
    message = str(caught.value)
    assert field in message and "\n" not in message and message.endswith(".")
    return message


def names_the_range(message, field):
    low, high = NUMBERS[field]
    return message.endswith(f"from {low:,} to {high:,}." if field in WHOLE else f"from {low:g} to {high:g}.")


# ---------------------------------------------------------------------------------------------- the named recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_builds_and_round_trips(name):
    made = recipe.get(name)
    assert made.name == name
    again = Recipe.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and hash(again) == hash(made)
    with torch.device("meta"):  # shapes without numbers: building 4.7 million parameters is not what is tested
        network = made.network()
    assert count_parameters(network) < 5_000_000


def test_the_paper_recipe_is_the_papers():
    paper = RECIPES["paper"]
    assert (paper.learning_rate, paper.momentum, paper.weight_decay) == (0.02, 0.9, 0.0001)
    assert (paper.epochs, paper.batch_size, paper.warmup_epochs, paper.dropout) == (300, 64, 10, 0.5)
    assert (paper.blocks, paper.width) == ((3, 3, 4, 3), 32)
    assert paper.mixup_alpha > 0 and paper.stage == STAGES[-1]
    assert count_parameters(paper.network()) == 4_698_028


def test_the_laptop_recipe_is_the_papers_on_a_short_schedule():
    assert RECIPES["laptop"].but(name="paper", epochs=300, warmup_epochs=10) == RECIPES["paper"]
    assert RECIPES["laptop"].epochs == 25


def test_the_ladder_climbs_one_stage_at_a_time():
    rungs = recipe.ladder(RECIPES["quick"])
    assert [rung.stage for rung in rungs] == [*STAGES, STAGES[-1]]
    assert [rung.mixup_alpha > 0 for rung in rungs] == [False] * len(STAGES) + [True]
    assert {rung.but(name="x", stage="none", mixup_alpha=0.0) for rung in rungs} == {
        RECIPES["quick"].but(name="x", stage="none", mixup_alpha=0.0)
    }
    assert all(rung.name in RECIPES for rung in rungs)


BASES = ("quick", "reduced", "laptop", "paper")


def test_a_variant_is_named_by_what_differs_and_nothing_has_two_names():
    quick, paper = RECIPES["quick"], RECIPES["paper"]
    made = recipe.vary(quick, learning_rate=(0.1, 0.00005), epochs=(8, 3, 8))
    assert [one.name for one in made] == [
        "quick", "quick-epochs-3", "quick-learning_rate-0.00005", "quick-learning_rate-0.00005-epochs-3"]  # fmt: skip
    assert made[3] == quick.but(name=made[3].name, learning_rate=5e-5, epochs=3)
    words = recipe.vary(quick, nesterov=(True,), policy=("trivialaugment",))[0]
    assert words == quick.but(name="quick-nesterov-true-policy-trivialaugment", nesterov=True, policy="trivialaugment")
    assert recipe.get(words.name) == words
    assert recipe.vary(quick.but(seed=3), epochs=(3,))[0].seed == 3
    assert recipe.vary(paper, mixup_alpha=(0.0, 1.0)) == [RECIPES["paper-rotation_autoaugment"], paper]
    grown = recipe.vary(quick, blocks=((1, 2),), resolutions=((16, 32),))[0]
    assert grown == quick.but(name="quick-blocks-1.2-resolutions-16.32", blocks=(1, 2), resolutions=(16, 32))
    assert recipe.get(grown.name) == grown
    with pytest.raises(CourseError, match="no field 'epoch'"):
        recipe.vary(quick, epoch=(1,))
    with pytest.raises(CourseError, match="warmup_epochs=1 leaves nothing of epochs=1"):
        recipe.vary(quick, epochs=(1,))


@pytest.mark.parametrize(("name", "base"), [pair for pair in product(recipe.SWEEPS, BASES)
                                            if pair != ("strength", "quick")])  # fmt: skip
def test_a_sweep_varies_what_it_says_and_its_names_lead_back(name, base):
    made = recipe.named(name, base)
    assert recipe.get(base) in made or name in ("policy", "approach")
    assert len({one.name for one in made}) == len(set(made)) == len(made) > 2
    assert all(recipe.get(one.name) == one for one in made)
    fields_of = {"ladder": {"stage", "mixup_alpha"}, "mixup": {"mixup_alpha"}, "se": {"reduction"},
                 "strength": {"strength"}, "dropout": {"dropout"}, "warmup": {"warmup_epochs"},
                 "rate": {"learning_rate", "weight_decay"}, "schedule": {"epochs"},
                 "beyond": {"ema_decay", "nesterov", "decay_all", "label_smoothing", "drop_path", "cutmix_alpha",
                            "sam_rho", "batch_size", "learning_rate", "consistency", "se_placement", "epochs",
                            "teacher", "blocks", "width", "stem_stride", "resolutions", "decoupled_decay",
                            "weight_decay",
                            *(["mixup_alpha"] if RECIPES[base].mixup_alpha else [])},
                 "policy": {"policy"},
                 "climb": {"stage", "mixup_alpha", "nesterov", "decay_all", "ema_decay", "label_smoothing",
                           "se_placement", "epochs", "resolutions", "width",
                           *(["dropout"] if RECIPES[base].dropout else []),
                           *(["blocks"] if max(RECIPES[base].blocks) > 1 else [])},
                 "approach": {"policy", "mixup_alpha", "cutmix_alpha", "nesterov", "decay_all", "ema_decay",
                              "drop_path", *(["dropout"] if RECIPES[base].dropout else []),
                              *(["learning_rate", "batch_size", "weight_decay"] if base != "quick" else []),
                              *(["blocks"] if base in ("paper", "laptop") else []),
                              *(["warmup_epochs"] if base == "paper" else [])}}[name]  # fmt: skip
    rows = [one.to_dict() for one in made]
    assert {field for field in rows[0] if len({str(row[field]) for row in rows}) > 1} == fields_of | {"name"}


def test_the_approach_on_the_papers_recipe_ends_at_beyond():
    assert recipe.approach(RECIPES["paper"])[0] == RECIPES["paper"]
    assert recipe.approach(RECIPES["paper"])[-1] == RECIPES["beyond"]
    for base in BASES:
        rungs = recipe.approach(RECIPES[base])
        once = [field for one, two in pairwise(rungs) for field, value in two.to_dict().items()
                if field != "name" and one.to_dict()[field] != value]  # fmt: skip
        assert len(set(once)) == len(once), "no rung takes back what another gave"


def test_what_goes_along_with_a_change_is_in_proportion():
    paper, made = RECIPES["paper"], recipe.ingredients(RECIPES["paper"])
    (larger,) = [one for one in made if one.batch_size != paper.batch_size]
    assert larger.batch_size == 256 and larger.learning_rate == paper.scaled_to(256).learning_rate == 0.08
    (apart,) = [one for one in made if one.decoupled_decay]
    assert apart.weight_decay == 0.001, "momentum 0.9 sums ten steps of it"


@pytest.mark.parametrize("base", ["paper", "beyond", "sprint"])
def test_what_beyond_is_made_of_stays_under_the_limit_of_parameters(base):
    made = recipe.ingredients(recipe.get(base))
    assert all(recipe.get(one.name) == one for one in made)
    shapes = {(one.blocks, one.width): one for one in made}
    assert len(shapes) == 3 and all(count_parameters(one.network()) < 5_000_000 for one in shapes.values())
    wide = next(one for one in made if len(one.blocks) == 3)
    assert (wide.blocks, wide.width) == (RECIPES[base].blocks[1:], 2 * RECIPES[base].width)


def test_a_sweep_takes_the_papers_values_and_those_around():
    values = lambda name, base, field: [getattr(one, field) for one in recipe.named(name, base)]  # noqa: E731
    assert values("se", "paper", "reduction") == [0, 4, 8, 16, 32]
    assert values("se", "quick", "reduction") == [0, 4, 8, 16]
    assert values("strength", "paper", "strength") == [0, 0.5, 1, 1.5]
    with pytest.raises(CourseError, match=r"changes nothing at stage=crop_flip.*\): choose another --base"):
        recipe.named("strength", "quick")  # which crops and flips alone
    with pytest.raises(CourseError, match=r"made on beyond .* no recipe beyond-none.*such as reduced or paper"):
        recipe.named("ladder", "beyond")
    assert values("warmup", "paper", "warmup_epochs") == [0, 5, 10, 20, 60]
    assert values("schedule", "paper", "epochs") == [75, 150, 300, 600]
    assert set(values("rate", "paper", "learning_rate")) == {0.01, 0.02, 0.04}
    assert recipe.named("quick-mixup_alpha-0.2", "paper") == [RECIPES["quick"].but(
        name="quick-mixup_alpha-0.2", mixup_alpha=0.2)]  # fmt: skip


@pytest.mark.parametrize(("name", "sentence"), [
    ("quick-epochs", "no recipe"), ("quick-epochs-x", "no recipe"), ("quick-nesterov-1", "no recipe"),
    ("quick-nesterov-false", "is the recipe quick: call"), ("quick-seed-3", "no recipe"),
    ("quick-epochs-3-epochs-4", "no recipe"), ("nope-epochs-3", "no recipe"), ("quick-epochs-0", "epochs=0 is out of"),
    ("quick-epochs-8", "is the recipe quick: call it by"), ("quick-epochs-03", "is the recipe quick-epochs-3:"),
    ("paper-mixup_alpha-0", "is the recipe paper-rotation_autoaugment:"),
])  # fmt: skip
def test_another_spelling_of_a_variant_is_refused(name, sentence):
    with pytest.raises(CourseError, match=sentence):
        recipe.get(name)


def test_a_short_recipe_is_shorter():
    quick, short = RECIPES["quick"], recipe.short(RECIPES["quick"])
    assert short.name != quick.name and short.epochs * short.train_size < quick.epochs * quick.train_size


def test_an_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(CourseError, match=r"'papper'.*paper.*laptop.*quick"):
        recipe.get("papper")


def test_get_changes_fields():
    assert recipe.get("quick", epochs=3, seed=7) == RECIPES["quick"].but(epochs=3, seed=7)


# ------------------------------------------------------------------------------------------------ what is refused


@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_a_number_outside_its_range_is_refused_with_the_range(field, draw):
    low, high = NUMBERS[field]
    if field in WHOLE:
        value = draw.draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    else:
        value = draw.draw(
            st.floats(max_value=low, exclude_max=True, allow_nan=False)
            | st.floats(min_value=high, exclude_min=True, allow_nan=False)
        )
    assert names_the_range(refused(field, value), field)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, None, "3", [3], 3j, torch.tensor(3)])
def test_what_is_no_number_is_refused_with_the_range(field, value):
    assert names_the_range(refused(field, value), field)


@pytest.mark.parametrize("field", WHOLE)
def test_a_whole_number_is_not_a_float(field):
    assert names_the_range(refused(field, float(getattr(Recipe("x"), field))), field)


@pytest.mark.parametrize("field", REAL)
def test_both_ends_of_a_range_are_allowed_and_a_whole_number_may_stand_for_a_float(field):
    low, high = NUMBERS[field]
    assert getattr(Recipe("x", **{field: low}), field) == low
    assert getattr(Recipe("x", **{field: high}), field) == high
    assert getattr(Recipe("x", **{field: 0 if low == 0 else 1}), field) in (0, 1)


@given(st.dictionaries(st.sampled_from(sorted(REAL)), st.floats(0, 1), max_size=3))
def test_a_recipe_either_round_trips_or_is_refused(changes):
    try:
        made = Recipe("x", **changes)
    except CourseError:
        alphas = [changes.get(name, 0) for name in ("mixup_alpha", "cutmix_alpha")]
        clash = (changes.get("consistency") and any(alphas)) or any(0 < alpha < 0.01 for alpha in alphas)
        assert clash or any(not NUMBERS[name][0] <= value <= NUMBERS[name][1] for name, value in changes.items())
    else:
        assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("blocks", [(), (1,) * 5, (0, 1), (1, 51), (1.0, 1), (True, 1), "31", 3, None, ((1,),)])
def test_impossible_blocks_are_refused(blocks):
    assert refused("blocks", blocks).endswith("1 to 4 whole numbers from 1 to 50.")


@pytest.mark.parametrize("sides", [(), (16,) * 11, (7, 32), (32, 65), (32.0,), "32", 32, None])
def test_impossible_resolutions_are_refused(sides):
    assert refused("resolutions", sides).endswith("1 to 10 whole numbers from 8 to 64.")


def test_every_resolution_has_an_epoch():
    assert Recipe("x", resolutions=(8, 64), epochs=2, warmup_epochs=0).resolutions == (8, 64)
    with pytest.raises(CourseError, match=r"^2 resolutions do not fit into epochs=1: give fewer\.$"):
        Recipe("x", resolutions=(8, 64), epochs=1, warmup_epochs=0)


def test_nesterov_needs_a_momentum():
    with pytest.raises(CourseError, match=r"^nesterov=True needs a momentum above 0"):
        Recipe("x", nesterov=True, momentum=0.0)


def test_blocks_from_json_become_a_tuple():
    assert Recipe("x", blocks=[1, 2]).blocks == (1, 2)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a\n", "A", "a b", "\n", "ä", None, 3])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(CourseError, match="name"):
        Recipe(name)


@pytest.mark.parametrize("stage", ["", "None", "everything", None, 1, [], ["none"]])
def test_an_unknown_stage_is_refused_with_the_stages(stage):
    assert all(known in refused("stage", stage) for known in STAGES)


@pytest.mark.parametrize("precision", ["float16", "bf16", None, torch.float32])
def test_an_unknown_precision_is_refused_with_the_choices(precision):
    message = refused("precision", precision)
    assert "bfloat16" in message and "float32" in message


@given(st.integers(1, 20), st.integers(0, 20))
def test_the_warm_up_ends_before_the_run(epochs, warmup):
    if warmup < epochs:
        assert Recipe("x", epochs=epochs, warmup_epochs=warmup).warmup_epochs == warmup
    else:
        with pytest.raises(CourseError, match=f"warmup_epochs={warmup} .*expected 0 to {epochs - 1}"):
            Recipe("x", epochs=epochs, warmup_epochs=warmup)


def test_a_batch_is_no_larger_than_the_training_set():
    assert Recipe("x", batch_size=100, train_size=100).batch_size == 100
    with pytest.raises(CourseError, match=r"batch_size=101 .*train_size=100.*2 to 100"):
        Recipe("x", batch_size=101, train_size=100)


@pytest.mark.parametrize("field", ["mixup_alpha", "cutmix_alpha"])
def test_views_of_a_mixed_image_are_not_compared(field):
    with pytest.raises(CourseError, match=r"consistency=12 compares views of one image.*set mixup_alpha=0 and cutmix"):
        Recipe("x", consistency=12.0, **{field: 1.0})


@pytest.mark.parametrize("field", ["mixup_alpha", "cutmix_alpha"])
def test_an_alpha_too_small_to_draw_from_is_refused(field):
    assert "expected 0 for none, or at least 0.01" in refused(field, 1e-3)


@pytest.mark.parametrize("field", ["teacher", "start"])
@pytest.mark.parametrize("name", ["quick-none", "../quick", "a b", None, 3])
def test_what_is_learned_from_is_a_recipe_of_one_word(field, name):
    assert refused(field, name).endswith("expected a name without '-', as quick or paper.")


def test_refined_differs_from_beyond_in_what_it_sees_and_for_how_long():
    beyond, refined = RECIPES["beyond"].to_dict(), RECIPES["refined"].to_dict()
    assert {name for name in beyond if beyond[name] != refined[name]} == {
        "name", "start", "stage", "mixup_alpha", "cutmix_alpha", "epochs", "warmup_epochs", "learning_rate",
        "ema_decay"}  # fmt: skip
    seen = {name: (beyond[name],) for name in ("stage", "mixup_alpha", "cutmix_alpha")}
    assert recipe.vary(RECIPES["refined"], learning_rate=(0.02,), **seen) == [
        recipe.get("refined-learning_rate-0.02-stage-rotation_autoaugment-mixup_alpha-0.2-cutmix_alpha-1")]  # fmt: skip


@pytest.mark.parametrize("placement", ["", "middle", None, 1])
def test_an_unknown_placement_is_refused_with_those_there_are(placement):
    assert refused("se_placement", placement).endswith("expected one of standard, pre, post, identity.")


@given(st.integers(8, 64), st.integers(1, 64))
def test_a_reduction_divides_the_width(width, reduction):
    if width % reduction == 0:
        assert Recipe("x", width=width, reduction=reduction).reduction == reduction
    else:
        with pytest.raises(CourseError, match=f"reduction={reduction} does not divide width={width}"):
            Recipe("x", width=width, reduction=reduction)


@pytest.mark.parametrize("change", [Recipe("x").but, lambda **changes: Recipe.from_dict({"name": "x", **changes})])
def test_an_unknown_field_is_refused_with_the_fields_there_are(change):
    with pytest.raises(CourseError) as caught:
        change(learning_rat=0.1)
    assert "'learning_rat'" in str(caught.value)
    assert all(field.name in str(caught.value) for field in fields(Recipe))


def test_a_change_is_checked_like_a_new_recipe():
    with pytest.raises(CourseError, match=r"epochs=0 .*from 1 to 5,000"):
        RECIPES["quick"].but(epochs=0)


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_a_recipe_is_frozen(field):
    made = Recipe("x")
    with pytest.raises(FrozenInstanceError):
        setattr(made, field, getattr(made, field))
