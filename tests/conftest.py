"""Settings of all tests."""

import os

# Before torch is imported: tensors here are tiny, and threads that wait for each other on a busy
# machine make the same tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
