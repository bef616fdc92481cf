"""Every error that the package raises on purpose.

::

    SearchE1Error
    ├── ConfigError      (ValueError)    a key, a flag or a combination of them
    ├── DataError        (ValueError)    a question, a passage or an artifact's content
    ├── ModelError       (ValueError)    a policy directory, its tokenizer, its context
    ├── RetrievalError   (RuntimeError)  the retriever did not answer, or answered rubbish
    ├── EndpointError    (RuntimeError)  a model's endpoint did not answer, or answered rubbish
    ├── RunError         (RuntimeError)  a run directory: locked, drifted, incomplete
    ├── NoLeadError      (RuntimeError)  the teacher does not lead; distilling would not help
    ├── PreflightError   (RuntimeError)  the policy, or the corpus, leaves the run nothing to learn from
    └── TrainingError    (RuntimeError)  training cannot go on (a loss that is not finite)

A bad output of a model is not an error but data: see ``types.StopReason``. Messages are one line and say what was found,
where, and how to mend it; the command line prints them as they are and leaves with status 2.
"""


class SearchE1Error(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(SearchE1Error, ValueError):
    """A configuration key, flag or combination that cannot be used."""


class DataError(SearchE1Error, ValueError):
    """Questions, passages or stored artifacts that cannot be read; names file and line."""


class ModelError(SearchE1Error, ValueError):
    """A policy that cannot be loaded, or that does not fit the task."""


class RetrievalError(SearchE1Error, RuntimeError):
    """Retrieval failed. Never turned into an empty observation."""


class EndpointError(SearchE1Error, RuntimeError):
    """A model's endpoint is down, refuses, or answers what is no completion."""


class RunError(SearchE1Error, RuntimeError):
    """A run directory that is in use, belongs to another config, or lacks a stage."""


class NoLeadError(SearchE1Error, RuntimeError):
    """The privileged prompt does not make the policy better, so there is nothing to distill."""


class PreflightError(SearchE1Error, RuntimeError):
    """What the policy does, or what the corpus holds, leaves the run nothing to learn from."""


class TrainingError(SearchE1Error, RuntimeError):
    """Training reached a state from which it cannot go on."""
