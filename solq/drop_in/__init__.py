"""The kernels inside other DETR codebases, which need no change, or one line: docs/drop_in.md.

Nothing here is imported by the rest of the project, and each module imports only the codebase it is named after.
"""
