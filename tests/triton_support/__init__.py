"""Tools that prove things about the Triton kernels without a GPU: see the modules."""
