"""Control experiment for the memorization attacks: they must detect a model that was overfitted on purpose, and must
not flag one that never saw the images.

    python -m benchmarks.memorization_control             three seeds, a table; half an hour on two cores
    python benchmarks/memorization_control.py --quick     one seed; under eight minutes; ends with one line of JSON

The overfitted model is trained for long on few clean images, the other model on many images. The first is attacked with
its own images, the second with images that it never saw. In both cases held-out images are treated alike. All images
are articles of Fashion-MNIST, at 16 px. AUC: by the larger of the similarities in features and in pixels. The line of
JSON has two AUCs: for the first model the lower one of its two attacks, for the second model the one farther from 0.5.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it also runs as a file

from benchmarks.report import arguments, save, spread, table
from benchmarks.studies import Job, Setting, train_all
from data_pipeline.inputs.sources import Source, open_source
from trainer.evaluation.attacks import Attack, Masked, Noised
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.evaluation.images import Images
from trainer.evaluation.measures import attacked
from trainer.inference.load import restore
from trainer.reports.evaluate_run import model_of

SIZE = 16
FEW, MANY = 20, 10_000
"""Images that each model is trained on: the first ones of the training images."""
ATTACKS: tuple[Attack, ...] = (Noised(1.0), Masked(0.25))
OVERFITTED, UNSEEN = "overfitted", "never saw them"


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="one seed")
        p.add_argument("--seeds", type=int, default=3, help="trainings per model (default: 3)")
        p.add_argument(
            "--steps",
            type=int,
            default=1500,
            help="optimizer steps of the overfitted model; the other has a fifth (default: 1500)",
        )
        p.add_argument("--number", type=int, default=500, help="images to attack the other model with (default: 500)")
        p.add_argument("--at-once", type=int, default=2, help="trainings at the same time (default: 2)")
        p.add_argument("--folder", type=Path, default=Path("runs/memorization"), help="where runs are kept")

    args = arguments(__doc__, argv, add)
    setting = Setting("fashion", SIZE, args.folder, 1)
    train, test = open_source("packaged:fashion/train"), open_source("packaged:fashion/test")
    shape = (1, SIZE, SIZE)
    held_out = Images("held-out images", test, shape, len(test))
    known = Images("images that were learned", train, shape, FEW)
    unknown = Images("images that were not", after(train, MANY), shape, len(train) - MANY)
    few, many = setting.shards(0.0, limit=FEW), setting.shards(0.0, limit=MANY)
    rows: list[dict[str, Any]] = []
    for seed in range(1 if args.quick else args.seeds):
        names = {OVERFITTED: f"overfitted-{args.steps}-{seed}", UNSEEN: f"unseen-{args.steps}-{seed}"}
        jobs = [
            Job(names[OVERFITTED], few, (f"steps={args.steps}", f"seed={seed}")),
            Job(names[UNSEEN], many, (f"steps={args.steps // 5}", f"seed={seed}")),
        ]
        train_all(setting, jobs, args.at_once)
        for case, training, number in ((OVERFITTED, known, 100), (UNSEEN, unknown, args.number)):
            model = model_of(restore(args.folder / names[case]))
            for attack in ATTACKS:
                found = attacked(model, attack, training, held_out, open_extractor(PACKAGED), number, 15, seed)
                rows.append(
                    {
                        "model": case,
                        "attack": attack.name,
                        "seed": seed,
                        "share": found.share,
                        **{kind: auc.value for kind, auc in found.auc.items()},
                    }
                )
    print(report(rows))
    if args.quick:
        overfitted, unseen = ([row["both"] for row in rows if row["model"] == case] for case in (OVERFITTED, UNSEEN))
        print(
            json.dumps(
                {
                    "overfit_auc": round(min(overfitted), 4),
                    "unseen_auc": round(max(unseen, key=lambda value: abs(value - 0.5)), 4),
                }
            )
        )
        return 0
    record = {"few": FEW, "many": MANY, "steps": args.steps, "number": args.number, "rows": rows}
    print(f"\n{save('memorization-control', record)}")
    return 0


def after(source: Source, first: int) -> Source:
    """Returns a source without its first `first` pictures."""
    return Source(source.keys[first:], lambda i: source.read(i + first))


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    for model, attack in dict.fromkeys((row["model"], row["attack"]) for row in rows):
        of = [row for row in rows if (row["model"], row["attack"]) == (model, attack)]
        lines.append(
            [model, attack, *(spread([row[name] for row in of]) for name in ("features", "pixels", "both", "share"))]
        )
    return table(["model", "attack", "AUC, features", "AUC, pixels", "AUC, both", "above 5 % of held-out"], lines)


if __name__ == "__main__":
    sys.exit(main())
