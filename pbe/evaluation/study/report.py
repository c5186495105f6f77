"""What the answers to a study say: mean ranks, and how often one system is preferred to another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pbe import __version__
from pbe.evaluation.bootstrap import Bootstrap
from pbe.evaluation.markdown import table
from pbe.io.atomic import write_text
from pbe.io.json_text import parse_json, shown

QUESTIONS = ("quality", "likeness")
REPORT = "study-report"
BOOTSTRAP = Bootstrap(resamples=10_000)


@dataclass(frozen=True)
class Key:
    """Whose the pictures of a study are: of each item's pictures, by name, the system."""

    study: str
    systems: tuple[str, ...]
    items: dict[str, dict[str, str]]


@dataclass(frozen=True, eq=False)
class Answers:
    """One participant's answers.

    ranks: by question, float64 (items, systems), 1 = best, NaN where not ranked. places: int64 (items, systems), where
    each result stood, from 0.
    """

    participant: str
    ranks: dict[str, Tensor]
    places: Tensor


def read_key(path: str | Path) -> Key:
    """The key that `build_study` wrote. ValueError for another file."""
    path, otherwise = Path(path), "is not the key of a study; `study` writes it as key.json"
    content = _read_json(path, "pbe study key", otherwise)
    study, systems, items = content.get("study"), content.get("systems"), content.get("items")
    if not (isinstance(study, str) and isinstance(systems, list) and isinstance(items, dict)):
        raise ValueError(f"{path} {otherwise}")
    if not (all(isinstance(name, str) for name in systems) and all(_shows(shown, systems) for shown in items.values())):
        raise ValueError(f"{path} {otherwise}")
    return Key(study, tuple(systems), items)


def _shows(pictures: Any, systems: list[str]) -> bool:
    """Whether a key's item has one picture of each system."""
    return isinstance(pictures, dict) and sorted(map(shown, pictures.values())) == sorted(map(shown, systems))


def read_answers(path: str | Path, key: Key) -> Answers:
    """A file that the study's page saved. ValueError naming the file and what is wrong with it."""
    path = Path(path)
    content = _read_json(path, "pbe study answers", "does not hold answers to a study; the page saves them")
    if content.get("study") != key.study:
        raise ValueError(f"{path} answers the study {shown(content.get('study'))}, the key is of {key.study!r}")
    participant, answers = content.get("participant"), content.get("answers")
    if not (isinstance(participant, str) and participant and isinstance(answers, list)):
        raise ValueError(f"{path} must name its participant and list answers")
    rows = {item: i for i, item in enumerate(key.items)}
    shape = (len(key.items), len(key.systems))
    ranks = {question: torch.full(shape, math.nan, dtype=torch.float64) for question in QUESTIONS}
    places = torch.full(shape, -1)
    seen = set()
    for answer in answers:
        item = answer.get("item") if isinstance(answer, dict) else None
        if not isinstance(item, str) or item not in rows or item in seen:
            problem = "there twice" if isinstance(item, str) and item in rows else "not in the study"
            raise ValueError(f"{path}: the item {shown(item)} is {problem}")
        seen.add(item)
        pictures = key.items[item]
        for name in ("shown", *QUESTIONS):
            order = answer.get(name)
            if order is None and name != "shown":
                continue  # the question was left open
            texts = [picture for picture in order if isinstance(picture, str)] if isinstance(order, list) else []
            if texts != order or sorted(texts) != sorted(pictures):
                raise ValueError(
                    f"{path}: {name!r} of item {item} must be an order of {', '.join(sorted(pictures))}, got "
                    f"{shown(order)}"
                )
            columns = [key.systems.index(pictures[picture]) for picture in order]
            if name == "shown":
                places[rows[item], columns] = torch.arange(len(columns))
            else:
                ranks[name][rows[item], columns] = torch.arange(1, len(columns) + 1, dtype=torch.float64)
    return Answers(participant, ranks, places)


def _read_json(path: Path, kind: str, otherwise: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for what is not UTF-8
        raise ValueError(f"{path} {otherwise}: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} {otherwise}")
    return content


# --- numbers ----------------------------------------------------------------------------------------------


def study_report(key: str | Path, files: Sequence[str | Path], bootstrap: Bootstrap = BOOTSTRAP) -> dict[str, Any]:
    """The report of a study as JSON values, of its key and the participants' files.

    ValueError for a wrong file, two files of one participant, or no ranking by a question.
    """
    if bootstrap.resamples < 100:
        raise ValueError(f"resamples must be 100 or more, got {bootstrap.resamples}")
    known, found = read_key(key), []
    owners: dict[str, str | Path] = {}
    for path in files:
        answers = read_answers(path, known)
        if answers.participant in owners:
            raise ValueError(
                f"{path} is of the same participant as {owners[answers.participant]}: give only the later one"
            )
        owners[answers.participant] = path
        found.append(answers)
    if not found:
        raise ValueError("a report needs the answers of one participant or more")
    generator = bootstrap.generator()
    return {
        "pbe": __version__,
        "study": known.study,
        "participants": len(found),
        "items": len(known.items),
        "systems": list(known.systems),
        "bootstrap": asdict(bootstrap),
        "questions": {name: _answers_to(name, found, known.systems, bootstrap, generator) for name in QUESTIONS},
    }


def _answers_to(
    question: str,
    found: Sequence[Answers],
    systems: Sequence[str],
    bootstrap: Bootstrap,
    generator: torch.Generator,
) -> dict[str, Any]:
    ranks = torch.stack([answers.ranks[question] for answers in found])  # (P, I, S)
    is_ranked = ~ranks[..., 0].isnan()  # (P, I)
    if not is_ranked.any():
        raise ValueError(f"no file holds a ranking by {question}")
    means, draws = mean_ranks(ranks), bootstrap_mean_ranks(ranks, bootstrap.resamples, generator)
    places = torch.stack([answers.places for answers in found])[is_ranked]
    by_place = [ranks[is_ranked][places == place].mean().item() for place in range(len(systems))]
    return {
        "rankings": int(is_ranked.sum()),
        "mean_rank": {
            system: {name: value.item() for name, value in bootstrap.interval(means[s], draws[:, s])._asdict().items()}
            for s, system in enumerate(systems)
        },
        "preference": [
            {"system": systems[a], "over": systems[b], **preference(ranks[..., a], ranks[..., b], bootstrap.level)}
            for a, b in combinations(range(len(systems)), 2)
        ],
        "mean_rank_by_place": by_place,
    }


def mean_ranks(ranks: Tensor) -> Tensor:
    """The mean (S,) over all rankings of ranks (P, I, S); NaN where there is none."""
    return ranks[~ranks[..., 0].isnan()].mean(dim=0)


def bootstrap_mean_ranks(ranks: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Mean ranks (resamples, S) of participants and items each drawn with replacement.

    Both are samples of what could have been asked, and a ranking shares each with others: drawing rankings one by one
    would make intervals too narrow (Owen 2007, "The pigeonhole bootstrap"). A draw without a ranking is left out.
    """
    participants, items, _ = ranks.shape
    p, i = (_draw_counts(count, resamples, generator) for count in (participants, items))  # (R, P), (R, I)
    is_ranked = (~ranks[..., 0].isnan()).double()
    total = torch.einsum("rp,pis,ri->rs", p, ranks.nan_to_num(), i)
    count = torch.einsum("rp,pi,ri->r", p, is_ranked, i)
    return total[count > 0] / count[count > 0, None]


def _draw_counts(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` is among as many draws: float64 (resamples, count)."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    ones = torch.ones(resamples, count, dtype=torch.float64)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, ones)


def preference(a: Tensor, b: Tensor, level: float) -> dict[str, float]:
    """How often ranks a are before ranks b, both (P, I): the share of rankings with its Wilson interval.

    The interval takes rankings for independent. The sign test does not: each participant has one vote, for the system
    preferred in most of the items.
    """
    wins, losses = a < b, a > b  # neither where NaN
    win, of = int(wins.sum()), int((wins | losses).sum())
    low, high = wilson(win, of, level)
    votes = (wins.sum(dim=1) - losses.sum(dim=1)).sign()
    votes_for, votes_against = int((votes > 0).sum()), int((votes < 0).sum())
    return {
        "wins": win,
        "of": of,
        "share": win / of,
        "low": low,
        "high": high,
        "votes_for": votes_for,
        "votes_against": votes_against,
        "sign_test_p": sign_test(votes_for, votes_against),
    }


def wilson(wins: int, of: int, level: float) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927)."""
    z, share = NormalDist().inv_cdf((1 + level) / 2), wins / of
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(a: int, b: int) -> float:
    """The two-sided probability of votes at least as uneven as a to b, were both as likely."""
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return min(1.0, 2 * tail / 2 ** (a + b))


# --- text -------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown that also reads well as plain text."""
    level = f"{100 * report['bootstrap']['level']:g} %"
    counted = (("participant", report["participants"]), ("item", report["items"]), ("system", len(report["systems"])))
    lines = [f"# User study {report['study']}", ""]
    lines += [", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counted) + "."]
    for question, found in report["questions"].items():
        ranks = sorted(found["mean_rank"].items(), key=lambda one: one[1]["value"])
        rows = [[name, f"{x['value']:.2f}", f"{x['low']:.2f} to {x['high']:.2f}"] for name, x in ranks]
        lines += ["", f"## By {question}: {found['rankings']} rankings", ""]
        lines += [table(["system", "mean rank ↓", level], rows), ""]
        rows = [
            [
                f"{x['system']} over {x['over']}",
                f"{x['share']:.0%} of {x['of']}",
                f"{x['low']:.0%} to {x['high']:.0%}",
                f"{x['votes_for']} : {x['votes_against']}",
                f"{x['sign_test_p']:.3g}",
            ]
            for x in found["preference"]
        ]
        lines += [table(["preferred", "rankings", level, "participants", "sign test p"], rows), ""]
        by_place = ", ".join(f"{chr(65 + i)} {mean:.2f}" for i, mean in enumerate(found["mean_rank_by_place"]))
        expected = (len(ranks) + 1) / 2
        lines.append(f"Mean rank by place on the page: {by_place}; without any preference for a place {expected:.2f}.")
    lines += [
        "",
        f"Mean ranks, 1 = best: bootstrap intervals over participants and items, {report['bootstrap']['resamples']} "
        "resamples. Shares: Wilson intervals, which take rankings for independent; the sign test counts each "
        "participant once. Neither is corrected for the number of comparisons.",
    ]
    return "\n".join(lines) + "\n"


def write_study_report(report: dict[str, Any], out: str | Path) -> None:
    """Writes `study-report.json` and `study-report.md` into a folder."""
    texts = {".json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", ".md": markdown(report)}
    for suffix, text in texts.items():
        write_text(Path(out) / (REPORT + suffix), text)
