"""One thread for torch in the parent as in every rank, so that the twin's kernels round as the
ranks' do.
"""

import torch

torch.set_num_threads(1)
