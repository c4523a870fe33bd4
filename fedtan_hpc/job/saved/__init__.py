"""What a run has saved: doubted before a run goes on from it.  Used by ``resume``, ``run_dir``."""
