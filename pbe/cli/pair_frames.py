"""`pbe pair-frames`: from tracked boxes, pairs to train on whose exemplar is of another frame than the target.

OUT gets exemplars/ and the manifest pairs.csv, for data.source or data.sources.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    p.add_argument("tracks", type=Path, help="CSV or JSONL as training reads it, with columns track and frame")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--pairs", type=int, default=1, help="exemplars for each box (default 1)")
    p.add_argument("--min-gap", type=float, help="least difference of frame numbers (default: a tenth of the track)")
    p.add_argument("--seed", type=int, default=0, help="decides the choice (default 0)")
    p.add_argument("--force", action="store_true", help="replace an existing folder")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the exemplars and their manifest; returns the exit code."""
    from tqdm import tqdm

    from pbe.data.manifest import written_row
    from pbe.data.records import UnusablePicture
    from pbe.data.tracks import choose_pairs, cut_exemplar, read_frames
    from pbe.images.saving import save_picture
    from pbe.io.atomic import replacing

    args = parser(prog).parse_args(argv)
    if args.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {args.pairs}")
    frames, problems = read_frames(args.tracks)
    pairs = choose_pairs(frames, args.min_gap, args.pairs, args.seed)
    rows = []
    with replacing(args.out, args.force) as folder:
        for target, exemplar in tqdm(pairs, unit=" pairs"):
            name = f"exemplars/{exemplar:06}_{frames[exemplar].record.image.stem}.jpg"
            try:
                if not (folder / name).exists():
                    save_picture(cut_exemplar(frames[exemplar]), folder / name)
            except UnusablePicture as problem:  # one photo of thousands
                problems.append(problem)
                continue
            record, mask, *_ = frames[target]
            paths = {"exemplar": name, "mask": os.path.relpath(mask, args.out) if mask else ""}
            rows.append({**written_row(record, 0, args.out), **paths})
        if not rows:
            far = f" at least {args.min_gap:g} frames apart" if args.min_gap else ""
            raise problems[0] if problems else ValueError(f"{args.tracks}: no track has a box in two pictures{far}")
        with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    alone = {frame.track for frame in frames} - {frames[target].track for target, _ in pairs}
    print(f"{args.out / 'pairs.csv'}: {len(rows)} pairs of {len(frames)} boxes; {len(alone)} tracks without a pair")
    if problems:
        print(f"  {len(problems)} boxes left out; the first: {problems[0]}")
    return 0
