"""Writes one sweep into MLflow, one record at a time; doing it twice changes nothing.

A child run passes through three states, kept in its tag ``prunefield.state``:

========= ==========================================================================
live      a training under way: curves only; adopted by whoever continues it
logging   its record is being written; found so later, it was cut short: made anew
logged    complete; skipped while the record's digest is the same, else made anew
========= ==========================================================================

Nothing here is thread-safe or catches errors: `TrackingLogger` calls it from one thread, retries,
and gives up.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from orchestrator.keys import content_key
from orchestrator.results import Record
from orchestrator.store import Store
from orchestrator.tracking import images, names
from orchestrator.tracking.gallery import TABLES, Gallery, GridImage, views
from orchestrator.tracking.stores import open_client, quiet

MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_ENTITIES = 1000  # metrics, params and tags of one request
PAGE = 1000
MODEL_FILE = "model.safetensors"
CURVES = "train/"
SYSTEM_INTERVAL = 2.0


@dataclass
class Child:
    """What is known of a child run.

    Attributes:
        run_id: its MLflow id.
        status: its MLflow status (RUNNING, FINISHED, FAILED, KILLED).
        tags: its tags.
        last: the last step logged of each training curve.
        artifacts: where its files go.
    """

    run_id: str
    status: str
    tags: dict[str, str]
    last: dict[str, int]
    artifacts: str


class RunWriter:
    """The parent run of a sweep and its children.

    Args:
        uri: the tracking store.
        experiment: name of the experiment.
        info: the sweep.
        store: where the files beside the records are.

    Raises:
        TrackingError: the tracking store cannot be used.
    """

    def __init__(self, uri: str, experiment: str, info: names.SweepInfo, store: Store) -> None:
        self.uri = uri
        self.info = info
        self.store = store
        self.client: MlflowClient = open_client(uri)
        self.experiment_id: str = self._experiment(experiment)
        self.parent: str = self._parent()
        self.children: dict[str, Child] = {}
        self._dense: dict[str, str] = {}  # key of the run of each training's model
        self._outdated: set[str] = set()
        self._beside: dict[str, str] = {}  # pictures that are logged, and not in the tags yet
        for run in self._search_children():
            self._take(run.data.tags[names.KEY], _child(run))
        self._monitor: SystemMetricsMonitor | None = None
        self._end_abandoned()

    # --- opening ---------------------------------------------------------------------------

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(
                    name, artifact_location=names.artifact_location(self.uri, self.store)
                )
            except MlflowException:  # another sweep that begins now may have made it meanwhile
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _parent(self) -> str:
        tags = names.sweep_tags(self.info) | {names.STORAGE: self.store.identity()}
        where = f"tags.`{names.HASH}` = '{self.info.hash}' AND tags.`{names.KIND}` = 'sweep'"
        runs = self.client.search_runs(
            [self.experiment_id], where, order_by=["attributes.start_time ASC"]
        )
        for run in runs:
            if run.info.run_name == self.info.name:
                run_id: str = run.info.run_id
                self.client.update_run(run_id, status="RUNNING")
                self.client.log_batch(run_id, tags=_tags(tags))
                return run_id
        run = self.client.create_run(self.experiment_id, run_name=self.info.name, tags=tags)
        self.client.log_text(run.info.run_id, self.info.yaml, "sweep.yaml")
        return str(run.info.run_id)

    def _search_children(self) -> Iterator[Run]:
        found = self._search(f"tags.`{names.PARENT}` = '{self.parent}'")
        yield from (run for run in found if names.KEY in run.data.tags)

    def _search(self, where: str) -> Iterator[Run]:
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], where, max_results=PAGE, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _end_abandoned(self) -> None:
        """End what drivers that were killed left running, of all sweeps of this storage."""
        here = f"tags.`{names.STORAGE}` = '{self.store.identity()}'"
        running = f"attributes.status = 'RUNNING' AND {here}"
        for run in list(self._search(running)):
            tags, run_id = run.data.tags, run.info.run_id
            lease = names.lease_of(run.info.run_name, tags.get(names.HASH, ""))
            if run_id == self.parent or self.store.lease_holder(lease) is not None:
                continue
            inside = f"attributes.status = 'RUNNING' AND tags.`{names.PARENT}` = '{run_id}'"
            for child in list(self._search(inside)):
                self.client.set_terminated(child.info.run_id, "KILLED")
            self.client.set_terminated(run_id, "KILLED")

    def _end_duplicates(self) -> None:
        """Remove runs that a broken connection made twice: begun there, unknown here."""
        known = {child.run_id for child in self.children.values()}
        where = f"attributes.status = 'RUNNING' AND tags.`{names.PARENT}` = '{self.parent}'"
        self._outdated |= {run.info.run_id for run in self._search(where)} - known

    def _take(self, key: str, child: Child) -> None:
        """One run a key: if a crash left two, the complete one stays."""
        other = self.children.setdefault(key, child)
        if other is not child:
            keep, drop = (
                (child, other) if child.tags.get(names.STATE) == "logged" else (other, child)
            )
            self.children[key] = keep
            self._outdated.add(drop.run_id)
        self._index(key)

    # --- records ---------------------------------------------------------------------------

    def is_logged(self, record: Record) -> bool:
        """Whether the run of this very record is complete."""
        child = self.children.get(record.key)
        return (
            child is not None
            and child.status in ("FINISHED", "FAILED")
            and child.tags.get(names.STATE) == "logged"
            and child.tags.get(names.DIGEST) == names.digest(record)
        )

    def write_record(self, record: Record) -> None:
        """Log a training or a trial, unless it is there already."""
        if self.is_logged(record):
            return
        run_id = self._begin(record)
        model_id = None
        whole = {names.STATE: "logged", names.DIGEST: names.digest(record)}
        if record.failure is None:
            model_id = self._write_model(record, run_id)
            self._write_images(record, whole)
        if record.kind == "training":
            self._link_trials(record.training, run_id)
        self._write_numbers(record, run_id, model_id, whole)
        self._end_child(record.key, "FAILED" if record.failure else "FINISHED", _ended(record))

    def _begin(self, record: Record) -> str:
        """A run in state ``logging`` for a record; what was cut short or is outdated is removed."""
        old = self.children.get(record.key)
        tags = names.record_tags(record, self.info, self.parent)
        if old is not None and old.tags.get(names.STATE) == "live":
            self._tag(record.key, {**tags, names.STATE: "logging"})
            return old.run_id
        name = names.run_name(record.kind, record.key, record.config)
        run_id = self._create(
            record.kind,
            record.key,
            record.training,
            name=name,
            tags={**tags, names.STATE: "logging"},
            start=_milliseconds(record.provenance.started),
        )
        if old is not None:
            self._outdated.add(old.run_id)
            if record.kind == "training":
                self._copy_curves(old.run_id, run_id)
        self._remove_outdated()
        return run_id

    def _create(
        self,
        kind: str,
        key: str,
        training: str,
        *,
        name: str,
        tags: Mapping[str, str],
        start: int | None = None,
    ) -> str:
        tags = {**names.child_tags(kind, key, training, self.info, self.parent), **tags}
        if kind != "training" and (of := self._training_run(training)):
            tags[names.TRAINING_RUN] = of
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags, start_time=start)
        self.children[key] = Child(run.info.run_id, "RUNNING", tags, {}, run.info.artifact_uri)
        self._index(key)
        return str(run.info.run_id)

    def _index(self, key: str) -> None:
        tags = self.children[key].tags
        if tags.get(names.KIND) == "training":
            self._dense[tags[names.TRAINING]] = key

    def _training_run(self, training: str) -> str | None:
        """The run of the model that a trial pruned, if it is known yet."""
        key = self._dense.get(training)
        return None if key is None else self.children[key].run_id

    def _remove_outdated(self) -> None:
        for run_id in tuple(self._outdated):
            for model in self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{run_id}'"
            ):
                self.client.delete_logged_model(model.model_id)
            self.client.set_terminated(run_id, "KILLED")
            self.client.delete_run(run_id)
            self._outdated.discard(run_id)

    def _write_model(self, record: Record, run_id: str) -> str | None:
        dense = record.kind == "training"
        entry = ("checkpoint", record.training) if dense else (record.kind, record.key)
        path = self.store.file(*entry, MODEL_FILE)
        if not path.is_file():
            return None
        model = self.client.create_logged_model(
            self.experiment_id,
            name=f"{'dense' if dense else 'pruned'}-{record.key}",
            source_run_id=run_id,
            params=names.params(record),
            tags={names.KEY: record.key, names.HASH: self.info.hash},
            model_type="nerf",
        )
        try:
            self._artifacts(model.artifact_location).log_artifact(str(path))
        except Exception:
            self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def _write_numbers(
        self, record: Record, run_id: str, model_id: str | None, tags: Mapping[str, str]
    ) -> None:
        """Params, metrics, and after them tags: in one request, unless they are very many."""
        # The record's own time: writing the same number again is then no second number.
        at = _milliseconds(record.provenance.started)
        metrics = [
            Metric(name, value, at, 0, model_id=model_id)
            for name, value in names.summary_metrics(record).items()
        ]
        metrics += [
            Metric(name, value, at, step) for name, value, step in names.view_metrics(record)
        ]
        params = [Param(k, v[: names.MAX_PARAM]) for k, v in names.params(record).items()]
        *early, params = list(_batches(params, MAX_PARAMS)) or [[]]
        for batch in early:
            self.client.log_batch(run_id, params=batch)
        room = MAX_ENTITIES - len(params) - len(tags)
        *early, metrics = list(_batches(metrics, room)) or [[]]
        for batch in early:
            self.client.log_batch(run_id, metrics=batch)
        self.client.log_batch(run_id, metrics=metrics, params=params, tags=_tags(tags))
        self.children[record.key].tags.update(tags)

    def _write_images(self, record: Record, tags: dict[str, str]) -> None:
        step = names.image_step(record)
        renders = self.store.folder(record.kind, record.key) / "renders"
        paths = sorted(renders.glob("view_*.png"))
        if paths:
            shown = [GridImage(f"render/{p.stem}", step, p) for p in paths]
            self._log_images({self.children[record.key].artifacts: shown})
            tags |= images.TAG

    def _log_images(self, shown: Mapping[str, Sequence[GridImage]]) -> None:
        """Log pictures of runs, by where the files of each go; all small copies side by side."""
        with tempfile.TemporaryDirectory(prefix="prunefield.") as name:
            folders = {where: Path(name) / str(i) for i, where in enumerate(shown)}
            for folder in folders.values():
                folder.mkdir()
            images.write_images((i, folders[where]) for where, of in shown.items() for i in of)
            for where, folder in folders.items():
                self._artifacts(where).log_artifacts(str(folder), images.FOLDER)

    def _artifacts(self, where: str) -> ArtifactRepository:
        """What the client would ask the tracking store for, run by run: it is known here."""
        return get_artifact_repository(where, tracking_uri=self.uri)

    def _link_trials(self, training: str, run_id: str) -> None:
        for trial, child in self.children.items():
            if (
                child.tags.get(names.KIND) in ("trial", "control")
                and child.tags.get(names.TRAINING) == training
                and child.tags.get(names.TRAINING_RUN) != run_id
            ):
                self._tag(trial, {names.TRAINING_RUN: run_id})

    # --- training curves -------------------------------------------------------------------

    def write_curve(self, key: str, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log points (step, time in ms, metrics) of a training under way.

        Steps that the run already holds, from before an interruption, are not logged again.
        """
        child = self.children.get(key)
        if child is None:
            name = names.run_name("training", key, {})
            self._create("training", key, key, name=name, tags={names.STATE: "live"})
            child = self.children[key]
        elif child.tags.get(names.STATE) != "live":
            return
        elif child.status != "RUNNING":
            self.client.update_run(child.run_id, status="RUNNING")
            child.status = "RUNNING"
        metrics = []
        for step, at, values in points:
            for name, value in values.items():
                curve = CURVES + name
                if curve not in child.last:
                    child.last[curve] = -1
                if step > child.last[curve]:
                    metrics.append(Metric(curve, float(value), at, step))
        for batch in _batches(metrics, MAX_METRICS):
            self.client.log_batch(child.run_id, metrics=batch)
            for metric in batch:
                child.last[metric.key] = max(child.last[metric.key], metric.step)

    def _copy_curves(self, old: str, new: str) -> None:
        for name in self.client.get_run(old).data.metrics:
            if name.startswith(CURVES):
                for batch in _batches(self.client.get_metric_history(old, name), MAX_METRICS):
                    self.client.log_batch(new, metrics=batch)

    # --- the parent run --------------------------------------------------------------------

    def start_monitor(self) -> None:
        """Log this machine's CPU, memory, disk, network and GPU on the parent run."""
        with quiet():
            self._monitor = SystemMetricsMonitor(
                self.parent,
                sampling_interval=SYSTEM_INTERVAL,
                resume_logging=True,
                tracking_uri=self.uri,
            )
            self._monitor.start()

    def stop_monitor(self) -> None:
        """End the system metrics; once is enough."""
        if self._monitor is not None:
            with quiet():
                self._monitor.finish()
            self._monitor = None

    def write_side_by_side(self, pictures: Mapping[str, GridImage]) -> None:
        """A picture of each of these runs, by key; its tags come with those of the front."""
        new = {
            key: image
            for key, image in pictures.items()
            if (child := self.children.get(key)) and child.tags.get(names.BESIDE) != image.key
        }
        self._log_images({self.children[key].artifacts: [image] for key, image in new.items()})
        self._beside |= {key: image.key for key, image in new.items()}

    def write_front(self, keys: frozenset[str], metrics: Mapping[str, float]) -> None:
        """Tag the runs of the front, so that the UI can filter them; metrics of the sweep."""
        for key, child in self.children.items():
            kind, tags = child.tags.get(names.KIND), {}
            value = "true" if key in keys else "false"
            if kind == "trial" and child.tags.get(names.FRONT, "false") != value:
                tags[names.FRONT] = value
            shown = "front" if key in keys or kind == "training" else "rest"
            if child.tags.get(names.SHOWN, "rest") != shown:
                tags[names.SHOWN] = shown
            if key in self._beside:
                tags |= {names.BESIDE: self._beside[key], **images.TAG}
            if tags:
                self._tag(key, tags)
                self._beside.pop(key, None)
        self.client.log_batch(
            self.parent,
            metrics=[Metric(name, float(v), _now(), 0) for name, v in metrics.items()],
        )

    def write_gallery(self, gallery: Gallery) -> None:
        """The pictures, tables and views of the sweep's own run; what is there already stays."""
        for name, columns in (gallery.tables or {}).items():
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            self.client.log_dict(self.parent, {"columns": list(columns), "data": rows}, name)
        tables = [{"path": name, "type": "table"} for name in gallery.tables or {}]
        self.client.log_batch(self.parent, tags=[RunTag(TABLES, json.dumps(tables))])
        for key, value in views(self.parent, self.info.hash, gallery).items():
            if len(value) <= names.MAX_TAG:
                self.client.set_experiment_tag(self.experiment_id, key, value)
        shown = [(i.key, i.step, i.path.parents[1].name) for i in gallery.images]
        digest = content_key({"images": shown})
        run = self.client.get_run(self.parent)
        if run.data.tags.get(names.GALLERY) == digest:
            return
        if names.GALLERY in run.data.tags:
            self._artifacts(run.info.artifact_uri).delete_artifacts("images")
        if gallery.images:
            self._log_images({run.info.artifact_uri: gallery.images})
        tags = {names.GALLERY: digest, **(images.TAG if gallery.images else {})}
        self.client.log_batch(self.parent, tags=_tags(tags))

    def write_progress(self, text: str) -> None:
        """Leave word of how the sweep stands."""
        self.client.log_batch(self.parent, tags=[RunTag(names.PROGRESS, text)])

    def write_report(self, folder: Path) -> None:
        """Keep the files of the report on the parent run."""
        self.client.log_artifacts(self.parent, str(folder), "report")

    def end(self, status: str) -> None:
        """End every child that still runs, then the parent."""
        self._end_duplicates()
        self._remove_outdated()
        for key, child in self.children.items():
            if child.status == "RUNNING":
                self._end_child(key, "KILLED")
        self.client.set_terminated(self.parent, status)
        self.stop_monitor()  # last: after an outage it may wait for retries of MLflow's own

    # --- small things ----------------------------------------------------------------------

    def _tag(self, key: str, tags: Mapping[str, str]) -> None:
        child = self.children[key]
        self.client.log_batch(child.run_id, tags=_tags(tags))
        child.tags.update(tags)
        self._index(key)

    def _end_child(self, key: str, status: str, at: int | None = None) -> None:
        child = self.children[key]
        self.client.set_terminated(child.run_id, status, at)
        child.status = status


def _child(run: Run) -> Child:
    # `get_metric_history` of every curve would be slow; the run itself knows each last step.
    last = {m.key: m.step for m in run.data._metric_objs if m.key.startswith(CURVES)}
    tags = dict(run.data.tags)
    return Child(run.info.run_id, run.info.status, tags, last, run.info.artifact_uri)


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value) for name, value in tags.items()]


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _milliseconds(iso: str) -> int:
    try:
        return int(datetime.fromisoformat(iso).timestamp() * 1000)
    except ValueError:
        return _now()


def _ended(record: Record) -> int:
    """When the work was done, not when it was logged: the run's duration is the work's."""
    seconds = sum(s for s in record.provenance.seconds.values() if math.isfinite(s))
    return _milliseconds(record.provenance.started) + int(1000 * seconds)


def _now() -> int:
    return int(datetime.now().timestamp() * 1000)
