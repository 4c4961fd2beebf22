from hemostat.interface.comparison import compare as compare
from hemostat.interface.reports import Report as Report
from hemostat.interface.scoring import score as score
from hemostat.interface.streaming import ConfidenceSequence as ConfidenceSequence
from hemostat.interface.streaming import DependenceEstimate as DependenceEstimate

__version__: str
