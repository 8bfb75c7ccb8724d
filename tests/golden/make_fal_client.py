"""Write fal_client.json beside this file from the installed fal_client: python tests/golden/make_fal_client.py"""

import json
import sys
from pathlib import Path

import fal_client

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.fal_client_surface import EXTRA_NAMES, surface

names = sorted({*fal_client.__all__, *EXTRA_NAMES})
golden = {"fal_client": fal_client.__version__, "all": sorted(fal_client.__all__), "names": surface(fal_client, names)}
Path(__file__).with_name("fal_client.json").write_text(json.dumps(golden, indent=1) + "\n")
