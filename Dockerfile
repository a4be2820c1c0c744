# dpojax for one kind of accelerator: docker build --build-arg EXTRAS=tpu,gcs --tag dpojax .
# EXTRAS are those of setup.cfg: tpu or gpu, and gcs or s3 for paths in a bucket.
FROM python:3.12-slim

ARG EXTRAS=tpu,gcs

RUN useradd --create-home --uid 1000 dpojax

COPY setup.cfg pyproject.toml README.md LICENSE /source/
COPY dpojax /source/dpojax
COPY configs /source/configs
COPY experiments /source/experiments
RUN pip install --no-cache-dir "/source[${EXTRAS}]" && rm -rf /source

USER 1000
WORKDIR /home/dpojax

CMD ["dpojax", "--version"]
