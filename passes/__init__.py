"""Graph passes: find attention sites in a captured graph and rewrite them.

``run.PIPELINE`` lists them. The order matters: masks are lifted before ``decide`` looks at them, every refusal comes
before ``lower`` changes anything, and ``clean_up`` sees the whole graph last.
"""

from omnisparse_flex.passes.run import PIPELINE, run_pipeline
from omnisparse_flex.passes.snapshot import Snapshot
from omnisparse_flex.passes.state import Rewrite, Settings, Site, Skip

__all__ = ["PIPELINE", "Rewrite", "Settings", "Site", "Skip", "Snapshot", "run_pipeline"]
