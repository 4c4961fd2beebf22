"""The package of Hemostat's shell: the proxy, the shadow path, storage, metrics and the command line.

adapters      adapters (LoRA) that compensate the weights' error of a compressed checkpoint
admin         the admin port: the application, what it shows, and its protection
canaries      canaries: the same token sequences on every engine again
checkpoints   the parts of checkpoints that serving needs
cli           the command line
commands      one module for each command of the command line; `arguments` has what they share
config        the configuration: its sections (`schema`), where values come from (`loading`)
control       the control process: composition of all that is not in the request path
engines       the reports of the engines' plugins, the routes that they call
gate          the verdict on a candidate: prompts are asked of two servers
hooks         the interface by which the relay lets another layer inspect and change requests and responses
interface     what `import hemostat` offers to programs and notebooks: docs/python.md
interception  in a relay, what the hook of `hemostat.hooks` does
ipc           messages and framing between Hemostat's own processes
learner       the contextual learner, in a process of its own
logs          the logs of every process: text lines, or one JSON object per line
measurement   streaming figures of the scored requests, in groups; the alarms on them
metrics       the names and help texts of all metrics, and the Prometheus collector
openai        OpenAI's chat and completions API as vLLM implements it, without IO
profiles      the life of calibration profiles: proposed, tested, promoted, rolled back
reference     reference models behind one protocol
relay         the data path: an HTTP/1.1 proxy at protocol level, between clients and one upstream server
report        the parts of reports
scored_record the result of scoring: a token record and what is known of its request
scoring       the path from a capture to a scored token record and its users, in the control process
store         where profiles, events and state are kept: in memory or SQLite
supervisor    the supervisor of `hemostat serve`, `relay` and `control`
tracing       OpenTelemetry traces, used where `tracing.endpoint` is set
"""

import importlib
from typing import Any

__version__ = "0.3.0.dev0"

_PUBLIC = {
    "ConfidenceSequence": "streaming",
    "DependenceEstimate": "streaming",
    "Report": "reports",
    "compare": "comparison",
    "score": "scoring",
}
"""The public names, and the module of `hemostat.interface` that has each. `__init__.pyi` has their types."""
__all__ = ["ConfidenceSequence", "DependenceEstimate", "Report", "__version__", "compare", "score"]


def __getattr__(name: str) -> Any:
    """Returns a public name. It is loaded only now, so that a relay that reads the version loads nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hemostat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hemostat.interface.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
