"""How long torch's CPU threads wait for each other before they sleep. The programs import this module before torch,
whose OpenMP reads the setting once, when it is loaded. `import gpt` alone changes nothing.

GNU's OpenMP lets them spin for about a millisecond. If another program has one of the cores, the thread that should run
there comes late to every operation, while the others spin on a core that it could use. With 2,000 rounds of spinning
they soon sleep: on two cores, one of them busy, training makes half of the tokens of a quiet machine instead of a
third, and on a quiet machine nothing is lost."""

import os

SPINS = 2000

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
