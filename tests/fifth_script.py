"""A linear classifier on pixels: the smallest script of this project's shape, to copy from."""

import common  # noqa: F401  # isort: skip  (it refuses an older Python)
import sys

import numpy as np
import torch
from torch import nn

from common import amp, config, linear_eval, optim
from common.data import augment, sampling
from common.data.open import open_images
from common.report import page
from common.run import checkpoint
from common.run.card import Card
from common.run.inference import load_run
from common.run.launch import launch
from common.run.loop import Batch, Loop, Step
from common.run.run import Run, test_best_and_last

CARD = Card(
    name="fifth",
    about="Which class is an image of, by its pixels alone?",
    items="images",
    stages=("train",),
    headlines={"train/test/accuracy": "accuracy on the test split"},
    following={"train": "--eval RUN"},
)
STAGE = {"epochs": 4, "bs": 64, "lr": 1e-3, "wd": 1e-2, "optimizer": "adamw"}


# What a script of this size does without. Take a name out when you add what it does.
ABSENT = [
    *("accum", "check", "demo", "ensemble", "group_by", "impl", "predict", "ranges", "search"),
    *("teacher", "teacher_temperature", "teacher_weight", "trial"),
]


def parse_args(argv=None):
    parser = config.base_parser(CARD.name, __doc__, {"train": STAGE})
    parser.hide(*ABSENT)
    args = config.parse(parser, argv, {})
    config.reject_unused_flags(parser, args, ABSENT, "in this script")
    config.check_inference_flags(parser, args)
    return args, parser


def build_model(run):
    torch.manual_seed(run.args.seed)
    model = nn.Linear(3 * 16 * 16, len(run.model_spec["classes"])).to(run.world.device)
    if run.args.compile:
        model.compile()
    return model


def fetch(run, batches, epoch=None):
    labels = torch.from_numpy(run.data.labels)
    for items, pixels in zip(batches, run.data.batches(batches, run.args.workers), strict=True):
        yield Batch(pixels.to(run.world.device), items, labels[items].to(run.world.device), epoch)


def rows_of(batch):
    return augment.normalize(augment.resize(batch.inputs, 16)).flatten(1)


def train_step(run, model, optimizer, scaler, batch):
    optimizer.zero_grad(set_to_none=True)
    with amp.autocast(run.args.precision, run.world.device):
        logits = model(rows_of(batch))
    loss = nn.functional.cross_entropy(logits.float(), batch.labels)
    scaler.scale(loss).backward()
    return Step(
        {"loss": loss.detach()}, *amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    )


@torch.no_grad()
def evaluate(run, model, prefix, split):
    indices = run.splits[split]
    logits = torch.cat([model(rows_of(b)) for b in fetch(run, np.array_split(indices, 4))]).cpu()
    return linear_eval.score(prefix, logits, run.data.labels[indices], logits.shape[1])


def train(run):
    args, stage, indices = run.args, run.stages["train"], run.splits["train"]
    model = build_model(run)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, run.world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    progress = run.open_stage("train", parts, start="random")
    if run.is_done(progress):
        return
    loop = Loop(run, progress, steps=len(indices) // stage.bs, unit="img")
    for epoch in loop.epochs():
        done = progress.batch
        batches = sampling.epoch_batches(indices, stage.bs, args.seed, epoch, done, run.world)
        for batch in loop.batches(fetch(run, batches, epoch)):
            lr = loop.set_lr(optimizer)
            loop.end_step(train_step(run, model, optimizer, scaler, batch), lr)
        values = {"train/train/loss": progress.mean("loss")}
        if loop.is_eval_epoch():
            values |= evaluate(run, model, "train/val", "dev")
            accuracy = values["train/val/accuracy"]
            progress.select(accuracy, model.state_dict(), values, higher_is_better=True)
            progress.results = values
        loop.end_epoch(values)

    def test(network, _):
        return evaluate(run, network, "train/test", "test"), None

    results, _ = test_best_and_last(progress, model, test)
    run.log.metrics("train", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results)


def run_inference(args, world):
    loaded = load_run(args, CARD)
    images = open_images(loaded.path)
    run = loaded.as_run(args, world, images, sampling.split(images))
    model = build_model(run)
    checkpoint.load_weights(model, loaded.state["model"], loaded.source)
    loaded.write(evaluate(run, model, "eval/test", "test"), world)


def run_training(parser, args, world, signals):
    images = open_images(args.data)
    stage = config.stage_config(args, "train", STAGE, first=True, lr_of=None)
    splits = sampling.split(images)
    sampling.check_batch("train", stage.bs, len(splits["train"]), world.world_size)
    spec = dict(script=CARD.name, classes=images.classes)
    run = Run.open(
        args,
        world,
        signals,
        images,
        splits,
        spec,
        {"train": stage},
        card=CARD,
        chance={"train": ("a guess", float(np.log(len(images.classes))))},
        name=f"linear-bs{stage.bs}",
        identity=config.run_id(parser, args, data=images.fingerprint, **spec),
        input_text="input 16 px",
    )
    with run.session(page):
        train(run)


def main(argv=None):
    args, parser = parse_args(argv)
    return launch(parser, args, run_inference, run_training)


if __name__ == "__main__":
    sys.exit(main())
