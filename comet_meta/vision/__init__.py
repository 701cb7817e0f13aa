"""Pictures: reading them, frozen features, a prior from these, a report, and a command.

Needs the extra ``comet-meta[vision]``. The core of the package never imports it.
"""
