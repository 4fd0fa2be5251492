"""What another distribution adds to lora-probe, each by an entry point of its own (`setup.cfg`).

`rules` registers rules under codes of its own, `predictor` predicts what the engine `example` does with an adapter,
`engine` is that engine; `formats` is an output format.
"""

from __future__ import annotations

__version__ = "0.1.0"
