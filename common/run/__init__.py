"""What a run is and how it survives.

card.py        what a script says of itself
files.py       atomic writes, JSON, the format's number, the lock
dist.py        the ranks: torchrun, a Slurm job step or one process
signals.py     signals: save at the next step, then leave; or at once where nothing is to be saved
log.py         the console, log.jsonl, TensorBoard
checkpoint.py  verified checkpoints; the state of random generators
evaluation.py  the rows of an evaluation, kept where a run stops inside
progress.py    where one stage stands: exact resume, the best model, when to stop
loop.py        the parts of a training loop that all scripts share
directory.py   the run directory: its name, who may work in it, config.json, env.json
run.py         a run: its directory, log and stages, and how it ends
inference.py   --eval, --predict, --stream
ensemble.py    --ensemble
launch.py      the frame of every script's `main`; the runs of --search
"""
