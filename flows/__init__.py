"""When and in what order: the alignment pipeline as a Prefect flow, its schedule, and its user interfaces."""

import os

# Prefect reports its use over the network; read when it is imported, hence here.
os.environ.setdefault("DO_NOT_TRACK", "1")
