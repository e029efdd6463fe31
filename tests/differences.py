"""How far ours and another implementation lie apart: asserted, and the largest difference of each comparison kept.

`pytest` prints them at its end; docs/convert.md holds them.
"""

import numpy as np

LARGEST: dict[str, float] = {}


def agree(what: str, ours: object, theirs: object, tolerance: float = 1e-4, where: str = "") -> None:
    """Assert that two arrays agree to `tolerance`, absolute and relative, and keep their largest difference.

    what: the comparison, under which the difference is kept. where: which part of it, for the message.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance, err_msg=f"{what} {where}")
    LARGEST[what] = max(LARGEST.get(what, 0.0), float(np.abs(ours - theirs).max(initial=0)))
