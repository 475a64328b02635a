"""What older versions pickled loads, and goes on with the same bits. (Files: test_file.py.)"""

from __future__ import annotations

import base64
import io
import pickle
import zlib
from typing import Any

import numpy as np

from cases import DEFAULTS
from snapshots import assert_same_bits, assert_same_state
from test_file import arrays_of, golden_optimizer, golden_step

# The optimizer of the golden file after two steps, with buffers for gradients, of which 7 was added to the
# first. From before there was `ema_decay`, by protocol 2.
GOLDEN = """
eNqNlWt/E0UUxtO0tCVUbGsFQRG1olvQKlK1KrqpqFWCUUfFeIlhN9lmokmaJztLUzRSLk0bVETrBcUqgkC9oCjaoqDFXa/v/Ai+9FvozCSb
tAZ/Oi8me5nzP88858xmxBsdsEwjFtFiWqpbTL4+McHTtQN1eXiVULPH44kZA5qVZCbq82hQQl7+KJnFgn71d48coQV80g2mmWjsV/8oPexX
/yxdFNAUque/RsZEc796thzTwqchIxGnLBIzotowFlZCQ0180lJmPKvF4CtKDSktl0glthlYVAwtkZqig1YmybXPg7QULUnOaFktFYln+RoT
54WxWMnjfIVWNdNG2kSrcmg1O/WN00VF2lIMNbogE63RtJXKDHdHooNZozvF3Uho2aw27ItkuZC0ybJWlPnQVlrmS8dKb9Ee8IzigigP4/pM
n5EWFz50hOqEZbhQ5khqLJFeiyUFLCW4aAzLCJYrgbqAN+At4OIyMsaGMzzyEmn/QA9WFMfHcCnBSiVQL2nrcVkwGNz4Fx9yCngYLteLtCO0
jL91Cs6Es1N1TvtX+O2Z1c5uld/vdUZUXEF54k6CKxlW6bSNSslXUa7jagKF6+ii5aS96BJJVxOs4UlpbbprZDofX5vodCbSzhG1wY9rBb+b
4DqG6/UC1spmYFocN4SxjuMl2zmDnqBh5XHj/y1SsVQk2upKvklIvpmgV1o3ilvomsrm99tFe7I8T6nr5HBO2rO4VYi7jWA9w+36KO6wDNk+
Ee55hNGsocVMqEFZpYhoRxP+MPp4M92pSNOHsMHNf5fIfzfBPZXS9dOVQkGHVOwc9P9jwr0i+X0EGxkCerkjNrm4+wUuSPCArIDcSrOnOvCg
CH6IgDA8rFthPOIGPioCNxM8VvYhVApu9dQOPC4gTxA8yfCUrhnyIMsWRziPpxV5z7KGYSISxha+bU2hG+hyuokqPKVOe8sxJtOYgWgYMb7G
UEIN8pmRwYCrKi5UUYLEnIZK9OIZ0VDPEiTP3VAp3d2315WcFpIHCTIM0OWXwshlItrWOLJuLlPkYgRWpRJbS5UQvZDLOadUe69zmLfDrL3H
nrSn1HyLPe3HkCDnCIYZtumyi8vkiAk858KfF/A8wQsV+PYSfKkIcI73+J2j9libf5U9ZR9T7ZlOZ1cfRgR6B8FOhl16aHHpexaZg9/t4kcF
vkAwVsGP/ze+KPB7CF5keEnnh+jlORXY65JfEeR9BK/KCiRrjH1NQCYIXmd4Y76xb7qItwRiP8Hb1Z5cyNe1yeFMq3hHMA4QvMswWWPhey7m
fYE5SPBBFSOW2gdym3vatzgzKg4JzmGCDxmOnNOvoy7rmGBNEXz0r6yPBesTgk8ZjgtzPptjzucu5oTAfEHw5Xxz6lxzTgrIVwRfM0zPN2fG
RZwSiG8Ivi2fu9MlNe2V08a/POWLfSrOCOB3BN8zzNY4ddZl/iCYNoFTZv5YwzxUZtonVPwkmD8T/MLwq24ZltxC6U/QiOG3cUvv/hsYtYYk
"""


class Unpickler(pickle.Unpickler):
    """Of what NumPy 2 pickled, also in NumPy 1.26, where a module of its has another name."""

    def find_class(self, module: str, name: str) -> Any:
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            module = module.replace("numpy._core", "numpy.core")
        return super().find_class(module, name)


def test_golden_pickle() -> None:
    twin = Unpickler(io.BytesIO(zlib.decompress(base64.b64decode(GOLDEN)))).load()
    assert twin.defaults.keys() == DEFAULTS.keys()
    for group in twin.param_groups:
        assert group["ema_decay"] is None
        assert all(type(group[key]) is type(value) for key, value in DEFAULTS.items())
    assert twin.param_groups[0]["tag"] == [1, "ü", None]
    assert [buffer.tolist() for buffer in twin.grads[0].values()] == [[[7, 7], [7, 7]], 0]
    assert not twin.grads[1][0].any()

    _, opt = golden_optimizer()
    for k in (1, 2):
        golden_step(opt, k)
    opt.grads[0]["w"] += 7
    for one in (opt, twin):
        golden_step(one, 3)
        one.step()
        one.param_groups[1]["ema_decay"] = 0.5
        golden_step(one, 4)
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert_same_state(twin, opt)
    assert_same_bits(twin.ema[1], opt.ema[1])
    again = pickle.loads(pickle.dumps(twin))
    assert_same_state(again, opt)
    twin.add_param_group({"params": np.ones(2)})
    assert twin.param_groups[2]["ema_decay"] is None and twin.lr == 0.25
