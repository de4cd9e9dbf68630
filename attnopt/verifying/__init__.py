"""Verification: what a rewrite costs in quality, paired with the source on the same held-out rows.

The gate is the upper bound of a confidence interval, never the mean: a rewrite is accepted when the
drop is at most the limit with 97.5 % confidence.
"""

from attnopt.verifying.calling import in_float32 as in_float32
from attnopt.verifying.gate import verify as verify
from attnopt.verifying.intervals import Paired as Paired
from attnopt.verifying.language import losses as losses
from attnopt.verifying.report import Report as Report
