"""One thread for torch in the parent as in every rank, so that the twin's kernels round as the
ranks' do. Drawn tests ask for results and not for speed: no example has a deadline.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("results", deadline=None)
settings.load_profile("results")
