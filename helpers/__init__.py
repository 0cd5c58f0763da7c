"""The one module the notebooks share. Each file is a room; later rooms use earlier ones, never the reverse:

runtime, readers, data, augment, distort, shift, mixing, model, recipe, runs, evaluate, estimate, publish, checkpoint,
train, sweep, plots, assess, figures, notebooks, bench, __main__.
"""
