"""The contract: every behaviour that an engine must have."""

from tests.engine_contract.aborts import Aborts
from tests.engine_contract.groups import Groups
from tests.engine_contract.queue import Queue
from tests.engine_contract.refusals import Refusals
from tests.engine_contract.rows import Rows
from tests.engine_contract.sampling import Sampling
from tests.engine_contract.sleep import Sleep
from tests.engine_contract.stop import Stop
from tests.engine_contract.text import Text
from tests.engine_contract.weights import WeightUpdates


class EngineContract(  # pytest runs the last one's tests first
    Stop,
    Refusals,
    Sleep,
    WeightUpdates,
    Queue,
    Aborts,
    Groups,
    Sampling,
    Text,
    Rows,
):
    """Rows, endings, text, sampling, aborts, weights and refusals."""
