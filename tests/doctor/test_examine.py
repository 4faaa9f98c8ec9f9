"""examine() on files, state dicts and live models, and the layers of live models in the normal form."""

import sys

import numpy as np
import pytest
import torch
from commands import run_python
from every_layer import KINDS
from torch import nn

import batchnorm
from batchnorm.doctor import examine as module
from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.checkpoint import ROLES
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.live_layers import layers_of_state, live_layers
from batchnorm.doctor.read.open import read
from batchnorm.doctor.rule import Needs, Rule
