# `make help` lists the targets.  Each sets up what it needs and reuses it.

PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
BIN := $(VENV)/bin
WHEEL := .venv-wheel

# Debian's Python, where there is one: what relayd is compared with is as Debian builds
# it, and a Python from elsewhere may be built without optimisation.
BENCH := .venv-bench
BENCH_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
PIP_QUIET := -q --disable-pip-version-check

# What relayd's own files say an environment holds; newer than that: set up again.
SETUP := setup.cfg pyproject.toml

# For the system tests, and for the benchmark.
SYSTEM_PACKAGES := chromium chromium-driver curl gcc libc6-dev \
  haproxy iperf3 libnginx-mod-stream nginx nftables nghttp2-client python3-venv socat wrk \
  dante-client dante-server strace systemd iproute2 ncat oidentd openssh-client openssh-server proxychains4 tnftp \
  bind9-dnsutils chrony dnsdist dnsmasq-base dnsperf groff man-db openssl prometheus sip-tester tshark unbound
# Debian's npm and those that come with another nodejs exclude each other.
SYSTEM_PACKAGES += $(if $(shell command -v npm),,nodejs npm)

# Each worker takes a part of the files in their order, and then from those who have
# more to do: a relay that the tests of a file share is seldom started twice.
AT_ONCE := -n auto --dist worksteal

# A hundred interpreters are started: none is to compile what another one has.
test test-floor coverage: export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/run: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_QUIET) -e .
	@touch $@

$(VENV)/test: $(VENV)/run
	$(BIN)/pip install $(PIP_QUIET) -e '.[test]'
	@# Many processes share the tests: none is to compile what the others do, too.
	find tests -name 'test_*.py' | xargs -n 120 -P 2 \
	  $(BIN)/python -m pytest --collect-only -q -m 'not system' >/dev/null
	@touch $@

$(VENV)/lint: $(VENV)/test
	$(BIN)/pip install $(PIP_QUIET) -e '.[lint,system,bench]'
	@touch $@

$(VENV)/system: $(VENV)/test tests/system/package-lock.json
	$(BIN)/pip install $(PIP_QUIET) -e '.[system]'
	@# The test that takes it says so if there is no npm.
	if command -v npm >/dev/null; then \
	  npm ci --prefix tests/system --ignore-scripts --no-audit --no-fund --loglevel=error; \
	fi
	@touch $@

$(BENCH)/bench: $(SETUP)
	test -x $(BENCH)/bin/python || $(BENCH_PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install $(PIP_QUIET) -e '.[bench]'
	@touch $@

$(FLOOR)/test: $(SETUP) tests/floor.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install $(PIP_QUIET) -c tests/floor.txt -e '.[test]'
	@touch $@

run: $(VENV)/run ## set up, and relay 127.0.0.1:8080 to a file server of this folder
	$(BIN)/twistd -n --pidfile= relayd --demo

test: $(VENV)/test ## set up, and run the tests (no root, no Debian package)
	$(BIN)/python -m pytest -m 'not system' $(AT_ONCE) $(ARGS)

test-floor: $(FLOOR)/test ## the same tests on the oldest Twisted that relayd takes
	$(FLOOR)/bin/python -m pytest -m 'not system' $(AT_ONCE) $(ARGS)

test-reactors: $(VENV)/test ## the relay's behaviour, whole, on the other reactors
	RELAYD_TEST_REACTOR=select $(BIN)/python -m pytest tests/live $(ARGS)
	RELAYD_TEST_REACTOR=asyncio $(BIN)/python -m pytest tests/live $(ARGS)

coverage: $(VENV)/test ## the tests, with branch coverage
	$(BIN)/python -m coverage run -m pytest -m 'not system' $(AT_ONCE) $(ARGS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

lint: $(VENV)/lint ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/lint ## put the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

system-deps: ## install the Debian packages of the system tests and the benchmark (root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(SYSTEM_PACKAGES)

system-test: $(VENV)/system ## real programs through the relay (see system-deps)
	@# Two files at once: each has machines of its own, and waits more than it works.
	$(BIN)/python -m pytest -m system -n 2 --dist loadfile $(ARGS)

bench: $(BENCH)/bench ## compare with other relays, into bench/results (under half an hour; see system-deps)
	$(BENCH)/bin/python -m bench full $(ARGS)

bench-quick: $(BENCH)/bench ## one short round of it, under two minutes
	$(BENCH)/bin/python -m bench quick $(ARGS)

bench-check: $(BENCH)/bench ## fail when a figure that relayd promises is missed
	$(BENCH)/bin/python -m bench check $(ARGS)

soak: $(VENV)/run ## 10 minutes of 2,000 misbehaving connections and 200 UDP flows, on each transport
	$(BIN)/python -m soak $(ARGS)

man: $(VENV)/test ## make the manual pages of man/ again
	$(BIN)/python -m relayd.ctl.manual man

wheel: $(VENV)/run ## build dist/*.whl
	$(BIN)/pip wheel $(PIP_QUIET) --no-deps -w dist .

clean: ## remove what the other targets made
	rm -rf $(VENV) $(FLOOR) $(WHEEL) $(BENCH) $(BENCH)-other build dist relayd.egg-info .coverage .coverage.* \
	  .mypy_cache .pytest_cache .ruff_cache .hypothesis twisted/plugins/dropin.cache \
	  tests/system/node_modules
	@# Not those of environments, whatever they are called.
	find bench contrib examples relayd soak tests twisted -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help run test test-floor test-reactors coverage lint format system-deps system-test \
  bench bench-quick bench-check soak man wheel clean
