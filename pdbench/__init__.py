"""pdbench: does prefill/decode disaggregation pay, in milliseconds and in joules?"""

__version__ = "0.1.0"
