# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

# `import golden` from any test: the golden files' reader is shared by all rooms.
sys.path.insert(0, str(Path(__file__).parent))
