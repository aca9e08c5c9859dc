"""Registers SRPO's trainer: a file for ms-swift's ``--external_plugins``, in a folder of its own.

ms-swift puts the folder of a plugin first on ``sys.path``, where the modules of the package would hide others.
"""

from srpo_swift.upstream import register

register()
