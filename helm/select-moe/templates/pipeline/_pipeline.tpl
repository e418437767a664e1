{{/* The pod of a command that talks to Kubeflow Pipelines. Takes a dict: root, component, args (a YAML list). */}}
{{- define "select-moe.kfpPod" -}}
{{- $profile := include "select-moe.profileConfigMap" .root }}
{{- $mounts := printf "%s\n%s" (toYaml (list (dict "name" "profile" "mountPath" "/etc/select-moe" "readOnly" true))) (include "select-moe.kfpTokenMount" .root) }}
{{- $volumes := printf "%s\n%s" (toYaml (list (dict "name" "profile" "configMap" (dict "name" $profile)))) (include "select-moe.kfpTokenVolume" .root) }}
{{- $account := printf "%s-kfp" (include "select-moe.fullname" .root) }}
{{- $args := printf "%s\n%s" .args (include "select-moe.kfpArgs" .root) }}
{{- include "select-moe.taskPod" (dict "root" .root "component" .component "args" $args "mounts" $mounts "volumes" $volumes "serviceAccount" $account) }}
{{- end }}

{{/* The site's profile, from the same values as everything else: pipelines/profile.py says what its keys are. */}}
{{- define "select-moe.profile" -}}
{{- $site := .Values.pipeline.profile }}
image: {{ include "select-moe.image" . }}
development: {{ empty .Values.image.digest }}
image_pull_policy: {{ .Values.image.pullPolicy }}
{{- with .Values.global.imagePullSecrets }}
image_pull_secrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
parameters:
  {{- $parameters := dict "work_root" (printf "s3://%s/%s" .Values.objectStorage.bucket .Values.pipeline.workPrefix) }}
  {{- toYaml (merge (dict) $site.parameters $parameters) | nindent 2 }}
environment:
  {{- $environment := dict "AWS_ENDPOINT_URL_S3" (include "select-moe.s3Endpoint" .) "AWS_DEFAULT_REGION" .Values.objectStorage.region }}
  {{- $_ := set $environment "MLFLOW_TRACKING_URI" (include "select-moe.mlflowUrl" .) }}
  {{- if .Values.mlflow.auth.enabled }}{{ $_ := set $environment "MLFLOW_TRACKING_USERNAME" .Values.mlflow.auth.username }}{{ end }}
  {{- toYaml (merge (dict) $site.environment $environment) | nindent 2 }}
{{- with include "select-moe.profileSecrets" . | trim }}
secrets:
  {{- . | nindent 2 }}
{{- end }}
labels:
  {{- toYaml (merge (include "select-moe.pipelineSelector" . | fromYaml) $site.labels) | nindent 2 }}
{{- range $key, $volume := dict "scratch" .Values.pipeline.scratch "model_cache" .Values.pipeline.modelCache }}
{{- if $volume.enabled }}
{{ $key }}:
  claim: {{ default (printf "%s-%s" (include "select-moe.fullname" $) (kebabcase $key)) $volume.existingClaim }}
  mount: {{ $volume.mountPath }}
{{- end }}
{{- end }}
{{- with omit $site "parameters" "environment" "secrets" "labels" }}
{{- range $key, $value := . }}
{{- if not (empty $value) }}
{{ dict $key $value | toYaml }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The Secrets of every task of the pipeline. */}}
{{- define "select-moe.profileSecrets" -}}
{{- $secrets := list }}
{{- with include "select-moe.s3Keys" . | fromJson }}
{{- $secrets = list (dict "name" (include "select-moe.s3Secret" $) "env" .) }}
{{- end }}
{{- if .Values.mlflow.auth.enabled }}
{{- $env := dict "MLFLOW_TRACKING_PASSWORD" .Values.mlflow.auth.existingSecret.passwordKey }}
{{- $secrets = append $secrets (dict "name" (include "select-moe.mlflowAuthSecret" .) "env" $env) }}
{{- end }}
{{- with .Values.pipeline.hubToken.existingSecret }}
{{- if .name }}{{ $secrets = append $secrets (dict "name" .name "env" (dict "HF_TOKEN" .tokenKey)) }}{{ end }}
{{- end }}
{{- with concat $secrets .Values.pipeline.profile.secrets }}
{{- toYaml . }}
{{- end }}
{{- end }}
