"""`python -m vgs_kernels`: which backend runs every op on every device here, and how to get the faster one."""

from . import backend_report

if __name__ == "__main__":
    print(backend_report())
