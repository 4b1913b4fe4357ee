"""Every planted fault, by the part of a training run that it breaks."""

from tests.faults.fault import Fault
from tests.faults.table.data import DATA
from tests.faults.table.gradients import GRADIENTS
from tests.faults.table.groups import GROUPS
from tests.faults.table.lora import LORA
from tests.faults.table.model import MODEL
from tests.faults.table.movement import MOVEMENT
from tests.faults.table.numbers import NUMBERS
from tests.faults.table.resume import RESUME

FAULTS: tuple[Fault, ...] = (
    *GRADIENTS,
    *MOVEMENT,
    *MODEL,
    *DATA,
    *RESUME,
    *NUMBERS,
    *GROUPS,
    *LORA,
)
