"""Fixtures of this folder: made-up results, and sessions that take a known time."""

from __future__ import annotations

import importlib.util
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from profiles.report import render

VOID = {"meta", "br", "hr", "img", "link", "input"}


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"profiles_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def factory():
    return _load("factory")


@pytest.fixture(scope="session")
def fakes():
    return _load("fakes")


class Page(HTMLParser):
    """Checks that tags balance and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def parsed():
    return Page


@pytest.fixture(scope="session")
def results(factory):
    return factory.sweep()


@pytest.fixture(scope="session")
def page(results):
    return render([results])
