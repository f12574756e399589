"""What Native Sparse Attention costs on a CPU, against what else a person could run there: `mindspeed-nsa bench`."""
