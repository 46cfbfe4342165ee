"""The tasks by name: what differs between them is a hook of ``Task``, never a case in the trainer or the commands."""

from __future__ import annotations

from i2v_models.tasks.captions import Captions, read_captions
from i2v_models.tasks.classification import Classification
from i2v_models.tasks.retrieval import Retrieval, evaluate_retrieval
from i2v_models.tasks.task import Task

TASKS: dict[str, type[Task]] = {"classification": Classification, "retrieval": Retrieval}

__all__ = ["TASKS", "Captions", "Classification", "Retrieval", "Task", "evaluate_retrieval", "read_captions"]
