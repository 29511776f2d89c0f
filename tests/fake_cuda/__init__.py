"""Training code on fake CUDA tensors, with a torch for CPUs: shapes and devices are right, and there is no data.

A mix of devices fails as on a GPU, and what would make the host wait for the device is counted.
"""
