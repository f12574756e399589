"""The real torch_npu over an emulated CANN: one device whose memory is host memory and whose operators are plain torch.

`build` makes the libraries that torch_npu links against, `device` answers inside the process that runs over them, `kernels`
says what each operator computes, `variants` where shipped versions of CANN may differ. Importing this package imports no torch.
"""
