#!/usr/bin/env bash
# All of unlearning.md: two models, three forget sets, three explained seeds, in two processes.
#   BENCH_DATA=... bash results/reference/unlearning.sh OUT
# then: for model in sentiment authors; do python -m bench.reference out=OUT/$model; done
set -u
out=${1:?a folder for what is made}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
updates=none,retrain,random_direction,gradient_ascent,grad_diff,npo,simnpo,finetune,salun,scrub,soul

sweep() { python -m bench -m task=unlearning seed=0,1,2 "$@" || echo "failed: $*" >&2; }

both_models() {
  sweep "$@" method=graddot forget=random,subset "unlearner=$updates"
  sweep "$@" method=cg,ekfac,diagonal,kfac,graddot forget=random,subset unlearner=influence
  sweep "$@" method=ekfac forget=random,subset unlearner=dmm
  sweep "$@" method=ekfac forget=topk "unlearner=$updates,influence,dmm"
  sweep "$@" method=graddot forget=random,subset unlearner=grad_diff,npo,simnpo,soul truth.unlearning.tune=true
}

sentiment() {
  both_models task.data=folder out="$out/sentiment"
  sweep task.data=folder out="$out/sentiment" method=cg method.curvature.iterations=20 unlearner=iterated_newton
}

authors() {
  both_models model=authors_gpt out="$out/authors"
  sweep model=authors_gpt out="$out/authors" method=graddot forget=subset unlearner=grad_diff mask=random,salun,wagle
}

started=$SECONDS
sentiment &
authors &
wait
echo "$((SECONDS - started)) s"
