"""Unit tests run two at a time: with a thread for each CPU, torch's would wait for each other, some forty times as long as they compute."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
