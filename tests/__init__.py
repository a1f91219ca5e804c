"""The tests. Ranks import what they run from here too."""

from tests.old_torch import VERSION, let_distribute_tensor_cut

if VERSION < (2, 7):
    let_distribute_tensor_cut()
