"""A run's rounds, record and end, whoever trains its clients: in this process, or real machines.

``begin`` and ``go_on`` are given a host, which opens the federation of the run's clients: that of
``fedpeft.run`` is the recipe's engine, that of a deployment's server is the sites.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import logs, sampling
from fedpeft.base import export_with_base
from fedpeft.baselines import baseline, clients_outcome, test_score
from fedpeft.comms.ledger import Ledger, messages
from fedpeft.config import Recipe
from fedpeft.config_load import dump_recipe, parse_recipe
from fedpeft.engine import AbortedRoundError, RoundReport, Seam, play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.events import Outcome, Summary, Watcher
from fedpeft.federation import Federation
from fedpeft.forecast import BytesSpentError, Purse
from fedpeft.metrics import Score
from fedpeft.model import save_adapter
from fedpeft.plan import make_plan
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.guard import BudgetSpentError, Guard
from fedpeft.record.checkpoint import Checkpoint, latest, save
from fedpeft.record.folder import RunFolder
from fedpeft.timed import Timed
from fedpeft.tree import Layout, Tree

Body = Callable[[Federation], Outcome]
Host = Callable[[Prepared, str, Body], Outcome]
"""``(prepared, identity of the run, body) -> what body returns``, given the clients."""


def begin(recipe: Recipe, watcher: Watcher, host: Host, ledger: Path | None = None) -> Summary:
    """A new run. Raises FedpeftError on bad input, before anything is written where possible.

    ledger: of a deployment, whose privacy ledger outlives its runs. KeyboardInterrupt and
    QuorumError leave a checkpoint of the last complete round.
    """
    RunFolder.check(Path(recipe.output.folder), recipe.output.overwrite)
    if ledger is not None and recipe.fleet.preset != "none":
        raise FedpeftError(
            f"fleet.preset={recipe.fleet.preset} in a deployment, whose devices and delays are "
            f"real: leave fleet: out."
        )
    prepared = prepare(recipe)
    purse, timed = Purse.of(prepared), Timed.of(prepared)
    output = recipe.output
    folder = RunFolder.create(Path(output.folder), output.overwrite, ledger is not None)
    folder.describe(dump_recipe(prepared.resolved()), prepared.population.fingerprint)
    state = prepared.strategy.init(prepared.problem)
    extra = _extra(Ledger(), 0, 0, 0, 0.0) | {"base": prepared.network.digest}
    with folder.lock(), guarded(prepared, ledger or folder.ledger) as guard:
        if guard is not None and guard.terms.whole_run and guard.ledger.clients():
            raise FedpeftError(
                f"{ledger} is the ledger of an earlier run, and with privacy.bands a run is "
                f"charged as a whole and cannot be begun again: set privacy.bands=0. Another "
                f"ledger would forget what the clients have spent."
            )
        job = Job(prepared, folder, watcher, Checkpoint(0, state, {}, extra), guard, purse, timed)
        job.save()
        return job.go(host)


def go_on(
    path: Path,
    watcher: Watcher,
    host: Host,
    ledger: Path | None = None,
    recipe: Recipe | None = None,
) -> Summary:
    """Goes on with a run from its newest whole checkpoint, as if it had never stopped.

    ledger: as in ``begin``. recipe: what the run is asked to be now; FedpeftError names what is not
    as the run began. Without one the recipe in the folder is taken.
    """
    folder = RunFolder.open(path)
    own = parse_recipe(folder.recipe(), str(folder.path))
    output = dataclasses.replace(own.output, folder=str(folder.path))
    prepared = prepare(dataclasses.replace(recipe or own, engine=own.engine, output=output))
    changed = folder.changes(dump_recipe(prepared.resolved()))
    if changed:
        listed = "; ".join(f"{key}={now!r}, was {was!r}" for key, (was, now) in changed.items())
        raise FedpeftError(
            f"{path}: the run began with another recipe: {listed}. Put it back, or start a new run."
        )
    folder.check_data(prepared.population.fingerprint)
    kind = type(prepared.strategy.init(prepared.problem))
    checkpoint, warnings = latest(folder.checkpoints, kind)
    if checkpoint.extra["base"] != prepared.network.digest:
        raise FedpeftError(
            f"{path}: the run was made with another base model (digest {checkpoint.extra['base']}, "
            f"now {prepared.network.digest}): restore model.name={prepared.recipe.model.name!r} as "
            f"it was, or start a new run."
        )
    prepared.post.restore(checkpoint.extra.get("post", {}))
    head = checkpoint.extra.get("privacy")
    with folder.lock(), guarded(prepared, ledger or folder.ledger, head) as guard:
        folder.metrics.truncate_after(checkpoint.round)
        timed = Timed.of(prepared)
        if timed is not None and "fleet" in checkpoint.extra:
            timed.restore(checkpoint.extra["fleet"], checkpoint.memory)
        job = Job(prepared, folder, watcher, checkpoint, guard, Purse.of(prepared), timed)
        again = [] if guard is None else guard.again(checkpoint.round)
        for text in [*warnings, f"resumed after round {checkpoint.round}", *again]:
            job.note(checkpoint.round, text)
        return job.go(host)


@contextmanager
def guarded(prepared: Prepared, ledger: Path, head: str | None = None) -> Iterator[Guard | None]:
    """What lets clients into the rounds, and its ledger; None without privacy.

    head: what the ledger must hold.
    """
    if prepared.terms is None:
        yield None
        return
    guard = Guard(prepared.terms, ledger, prepared.recipe, head)
    try:
        yield guard
    finally:
        guard.close()


def _extra(
    ledger: Ledger, messages: int, excluded: int, dropped: int, seconds: float
) -> dict[str, Any]:
    """A run's running totals, as a checkpoint holds them."""
    books = {"excluded": excluded, "dropped": dropped, "seconds": seconds, "messages": messages}
    return {"down": dict(ledger.down), "up": dict(ledger.up), **books}


@dataclass
class Job:
    """A run under way. ``at`` is the last complete round, as it would be checkpointed."""

    prepared: Prepared
    folder: RunFolder
    watcher: Watcher
    at: Checkpoint[Any]
    guard: Guard | None
    purse: Purse | None
    timed: Timed | None
    saved: int = field(default=-1)

    @logs.scope()
    def go(self, host: Host) -> Summary:
        """Rounds still to be played, then the end of the run."""
        began = time.perf_counter()
        logs.bind(run=self.folder.identity)
        recipe = self.prepared.recipe
        self.watcher.planned(make_plan(self.prepared), str(self.folder.path))
        self.watcher.stage(str(recipe.strategy["name"]), recipe.rounds.count)
        outcome = host(self.prepared, self.folder.identity, self._federate)
        return self._finish(outcome, began)

    def save(self) -> None:
        """Writes the last complete round's checkpoint, unless it is there."""
        if self.saved != self.at.round:
            save(self.folder.checkpoints, self.at, self.prepared.recipe.output.keep)
            self.saved = self.at.round

    def note(self, number: int, text: str) -> None:
        """A line in the record and on the screen."""
        self.folder.metrics.append("note", number, {"text": text})
        self.watcher.note(text)

    def _federate(self, federation: Federation) -> Outcome:
        """All rounds still to come, and the strategy's row of the last table."""
        self.saved = self.at.round
        kept = self.at.memory.items()
        federation.restore({c: {n: dict(t) for n, t in own.items()} for c, own in kept})
        count = self.prepared.recipe.rounds.count
        try:
            for number in range(self.at.round + 1, count + 1):
                self._round(federation, number)
        except (BudgetSpentError, BytesSpentError) as end:
            self.note(self.at.round, f"stopped before {end}")
        except (KeyboardInterrupt, QuorumError):
            self.save()
            raise
        self.save()
        return self._outcome(federation)

    def _round(self, federation: Federation, number: int) -> None:
        recipe, strategy, sizes = self.prepared.recipe, self.prepared.strategy, federation.clients()
        logs.bind(round=number)
        if self.purse is not None:
            books = (*self.at.extra["down"].values(), *self.at.extra["up"].values())
            self.purse.check(number, sum(books))
        names = self._drawn(number, sizes)
        self.watcher.round_began(number, len(names), self._tokens(names))
        state, report = self._played(federation, number, names)
        last = number == recipe.rounds.count
        due = last or number % recipe.evaluation.every == 0
        most = None if last else recipe.evaluation.sample
        wanted = due and strategy.shares
        measured = test_score(self.prepared, federation, state, most) if wanted else None
        if self.timed is not None and measured is not None:
            self.timed.measured(measured)
        self.at = Checkpoint(number, state, federation.memory(), self._books(report))
        self._log(report, measured)
        self.watcher.round_done(report, measured)
        if report.aborted:
            self.note(number, f"aborted: {report.aborted}")
        if number % recipe.output.checkpoint_every == 0:
            self.save()

    def _drawn(self, number: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Who is asked in a round."""
        recipe = self.prepared.recipe
        names = None if self.guard is None else self.guard.admit(number, sizes)
        if self.timed is not None:
            return self.timed.begin(self.at.state, number, names)
        if names is not None:
            return names
        return sampling.draw(recipe.rounds.sampling, sizes, recipe.seed, number)

    def _played(
        self, federation: Federation, number: int, names: tuple[str, ...]
    ) -> tuple[Any, RoundReport]:
        """The round's state and report; where it is aborted and may be, the state before it."""
        recipe, prepared = self.prepared.recipe, self.prepared
        seam, before = Seam(prepared.post, names), self.at.state
        try:
            if self.timed is not None:
                return self.timed.play(before, federation, number, names, prepared.post)
            return play_round(
                prepared.strategy, before, federation, recipe.rounds, recipe.seed, number, seam
            )
        except AbortedRoundError as error:
            if self.at.extra.get("aborted", 0) >= recipe.rounds.aborts:
                raise
            return before, error.report

    def _tokens(self, names: Iterable[str]) -> int:
        federation = self.prepared.federation()
        return sum(federation.tokens(name) for name in names)

    def _books(self, report: RoundReport) -> dict[str, Any]:
        before = dict(self.at.extra)
        ledger = Ledger(dict(before["down"]), dict(before["up"]))
        ledger.add(report.down, report.up)
        count = messages((*report.sent, *report.came))
        return (
            before
            | _extra(
                ledger,
                before["messages"] + count,
                before["excluded"] + len(report.excluded),
                before["dropped"] + len(report.dropped),
                before["seconds"] + report.seconds,
            )
            | {"aborted": before.get("aborted", 0) + 1 if report.aborted else 0}
            | {"post": self.prepared.post.memory()}
            | ({} if self.guard is None else {"privacy": self.guard.ledger.head})
            | ({} if self.timed is None else {"fleet": self.timed.memory()})
        )

    def _log(self, report: RoundReport, measured: Score | None) -> None:
        dropped = [{"client": name, "reason": "dropped out"} for name in report.dropped]
        excluded = [{"client": n, "reason": why} for n, why in report.excluded.items()]
        self.folder.metrics.append(
            "round",
            report.round,
            {
                "clients": len(report.sampled),
                "replies": report.replied,
                "failures": dropped + excluded,
                "loss": report.loss,
                "bytes_down": report.down,
                "bytes_up": report.up,
                "seconds": report.seconds,
                **({"aborted": report.aborted} if report.aborted else {}),
                **({"figures": dict(report.figures)} if report.figures else {}),
            },
        )
        books = {
            way: [{"clients": entry.clients, "each": entry.each} for entry in own]
            for way, own in (("down", report.sent), ("up", report.came))
        }
        self.folder.metrics.append("bytes", report.round, books)
        if self.timed is not None:
            self.folder.metrics.append("fleet", report.round, self.timed.line)
        if measured is not None:
            fields = {"scope": "test", "score": measured.as_dict()}
            self.folder.metrics.append("evaluation", report.round, fields)

    def _outcome(self, federation: Federation) -> Outcome:
        prepared, extra = self.prepared, self.at.extra
        clients = clients_outcome(prepared, federation, self.at.state)
        if clients.scores:
            figures = {name: own.as_dict() for name, own in clients.scores.items()}
            fields = {"scope": "clients", "score": figures}
            self.folder.metrics.append("evaluation", None, fields)
        return Outcome(
            str(prepared.recipe.strategy["name"]),
            test_score(prepared, federation, self.at.state),
            clients.mean,
            clients.worst,
            extra["down"],
            extra["up"],
            extra["seconds"],
        )

    def _finish(self, outcome: Outcome, began: float) -> Summary:
        adapter = self._export()
        rows = [outcome]
        for name in self.prepared.recipe.baselines:
            if name == outcome.name:
                continue
            row = baseline(self.prepared, name, self.watcher)
            self.folder.metrics.append(
                "baseline", None, {"name": name, "score": row.score.as_dict()}
            )
            rows.append(row)
        order = ["untrained", "local", outcome.name, "centralised"]
        rows.sort(key=lambda row: order.index(row.name))
        promise = None
        if self.guard is not None:
            self.guard.write()
            promise = self.guard.statement()
        summary = Summary(
            task=self.prepared.population.task,
            rows=tuple(rows),
            rounds=self.at.round,
            excluded=self.at.extra["excluded"],
            dropped=self.at.extra["dropped"],
            dense=4 * self.prepared.network.layout.size * self.at.extra["messages"],
            folder=str(self.folder.path),
            adapter=str(self.folder.adapter) if adapter else "",
            seconds=time.perf_counter() - began,
            privacy=() if promise is None else tuple(promise.lines()),
            fleet=None if self.timed is None else self.timed.summary(),
        )
        digest = "" if adapter is None else tree_digest(adapter)
        fields: dict[str, object] = {"rows": [_row(r) for r in rows], "adapter_digest": digest}
        if summary.fleet is not None:
            fields["fleet"] = dataclasses.asdict(summary.fleet)
        self.folder.metrics.append("summary", None, fields)
        self.watcher.finished(summary)
        return summary

    def _export(self) -> Tree | None:
        """Writes the final adapter for peft; strategies without a global adapter have none."""
        prepared = self.prepared
        if not prepared.strategy.shares:
            return None
        adapter = prepared.strategy.adapter(self.at.state)
        part = self.folder.path / ".adapter-writing"
        shutil.rmtree(part, ignore_errors=True)
        save_adapter(prepared.network, adapter, part, prepared.recipe.model.name)
        base = prepared.strategy.base(self.at.state)
        if base:
            export_with_base(prepared.network, adapter, base, part)
        shutil.rmtree(self.folder.adapter, ignore_errors=True)
        part.rename(self.folder.adapter)
        return adapter


def tree_digest(values: Tree) -> str:
    """SHA-256 over names, shapes and bytes of a tree: equal digests, bit-identical adapters."""
    digest = hashlib.sha256(Layout.of(values).digest.encode())
    for name in sorted(values):
        digest.update(values[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _row(row: Outcome) -> dict[str, object]:
    return {
        "name": row.name,
        "score": row.score.as_dict(),
        "mean": row.mean,
        "worst_decile": row.worst,
        "bytes_down": row.down,
        "bytes_up": row.up,
        "seconds": row.seconds,
    }
