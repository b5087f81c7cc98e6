"""What `swift_gkd.sh` hands to ms-swift: the method, with the settings that are not its defaults."""

from vgs_distill import MethodSettings
from vgs_distill.integrations.swift import register

register(MethodSettings(method="vgs", gamma=2.0, language_preservation=1.0))
