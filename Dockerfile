# A service of bundles. CPU:  docker build -t forcingkv .
# GPU, torch with CUDA:       docker build -t forcingkv --build-arg EXTRAS=serve,models --build-arg TORCH=torch==2.13.0 .
#
#     docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -e FORCINGKV_TOKEN=... \
#         -v ./bundles:/bundles:ro -v served:/data forcingkv --bundle /bundles/forcing-kv
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim
ARG EXTRAS=serve
# Empty: no torch. Packages of one index or another: TORCH="torch==2.13.0 --index-url ...".
ARG TORCH=
COPY --from=wheel /wheel /wheel
RUN if [ -n "$TORCH" ]; then pip install --no-cache-dir $TORCH; fi \
    && pip install --no-cache-dir "$(ls /wheel/*.whl)[$EXTRAS]" && rm -r /wheel \
    && useradd --system --uid 10001 --home-dir /data forcingkv && install -d -o forcingkv /data
USER 10001
VOLUME /data
WORKDIR /data
# What is cached lies in the volume too: the root may be read-only.
ENV HOME=/data XDG_CACHE_HOME=/data/cache PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["forcingkv", "serve", "--host", "0.0.0.0", "--data", "/data"]
