"""The kernels and configurations that benchmarks/compile_report.py compiles: a module per operator family."""
