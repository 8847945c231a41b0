from dist_defend.api import attack as attack
from dist_defend.api import defend as defend
from dist_defend.api import evaluate as evaluate
from dist_defend.api import load as load
from dist_defend.api import save as save
from dist_defend.api import train as train
from dist_defend.api import wrap as wrap
from dist_defend.errors import UserError as UserError

__version__: str
