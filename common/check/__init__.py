"""--check: the data set, the network and its training, tried before a run.

result.py      what an item gives, and what it may ask of a script
inspection.py  the items of a data set as the checks see them
data.py        items about the data set
human.py       the human baseline
trial.py       small batches, the script's own steps, hooks
model.py       items about the network: what enters it, leaves it and moves in it
reference.py   the losses a second time, by their papers' formulas
training.py    items that train for some steps and judge by the loss
audit.py       does every parameter train, and has every loss term a gradient?
runner.py      names the items, tries them, writes check.json
"""
