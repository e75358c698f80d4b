"""How every family is measured: what a case declares, the runner, the circumstances and the report."""
