"""Files that others may have damaged, replaced or planted: each is doubted before it is used.

``reading``, ``torch_files`` and ``owners`` are the only way to a file of a run or of a data set;
``atomic_files`` and ``folders`` the only way to write one.  Uses ``config``; all rooms above may
use it.
"""
