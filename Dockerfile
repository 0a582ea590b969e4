# Answers on CPU: serves the page, and runs every mode that trains nothing.
#
#   docker build -t ham-jax .
#   docker run --rm -p 127.0.0.1:8000:8000 ham-jax
#   docker run --rm -v "$PWD:/work" --user "$(id -u)" ham-jax predict --workdir=runs/lite --images=photographs/
#
# Docker asks /healthz whether the page answers; --no-healthcheck turns that off for other modes.

FROM python:3.12-slim-bookworm AS build
RUN python -m venv --without-pip /opt/ham_jax
# The packages change less often than the code, and are a layer of their own.
COPY requirements-predict.txt /src/
RUN pip --python /opt/ham_jax install --no-cache-dir -r /src/requirements-predict.txt
COPY . /src/
RUN pip --python /opt/ham_jax install --no-cache-dir --no-deps /src

FROM python:3.12-slim-bookworm
COPY --from=build /opt/ham_jax /opt/ham_jax
RUN useradd --uid 1000 ham_jax && mkdir -m 1777 /work /cache
# HOME for whoever --user names; compiled programs outlive the container in a volume at /cache.
ENV PATH=/opt/ham_jax/bin:$PATH HOME=/tmp JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=/cache
USER 1000
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["ham-jax"]
CMD ["serve", "--host=0.0.0.0", "--port=8000"]
