{{/* The pods of the project's own commands: hooks, tests, the retention job. Every helper takes the root context unless it says otherwise. */}}

{{/* What a client of Kubeflow Pipelines reads the token from that the API server of a Kubeflow with several users asks for. */}}
{{- define "select-moe.kfpTokenVolume" -}}
- name: kfp-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          audience: pipelines.kubeflow.org
          expirationSeconds: 7200
          path: token
{{- end }}

{{- define "select-moe.kfpTokenMount" -}}
- name: kfp-token
  mountPath: /var/run/secrets/kubeflow/pipelines
  readOnly: true
{{- end }}

{{/* The words that name the API server, for the commands that talk to it. */}}
{{- define "select-moe.kfpArgs" -}}
- {{ printf "endpoint=%s" .Values.kfp.endpoint | quote }}
{{- if .Values.certificates.existingConfigMap.name }}
- ca_file=/etc/certificates/ca.crt
{{- end }}
{{- if .Values.kfp.multiUser }}
- {{ printf "namespace=%s" .Release.Namespace | quote }}
{{- end }}
{{- end }}

{{/*
The pod of one of the project's own commands (python -m pipelines.install ...). Takes a dict: root; component; args, env,
mounts, volumes as YAML lists; serviceAccount; token (whether it may talk to the Kubernetes API).
*/}}
{{- define "select-moe.taskPod" -}}
metadata:
  labels:
    {{- include "select-moe.podLabels" . | nindent 4 }}
spec:
  {{- include "select-moe.taskPodSpec" . | nindent 2 }}
{{- end }}

{{- define "select-moe.taskPodSpec" -}}
{{- $hooks := .root.Values.hooks -}}
restartPolicy: Never
serviceAccountName: {{ .serviceAccount }}
automountServiceAccountToken: {{ .token | default false }}
enableServiceLinks: false
{{- with include "select-moe.imagePullSecrets" .root }}
{{- . | nindent 0 }}
{{- end }}
securityContext:
  {{- include "select-moe.podSecurityContext" .root | nindent 2 }}
{{- with include "select-moe.scheduling" $hooks | trim }}
{{- . | nindent 0 }}
{{- end }}
containers:
  - name: {{ .component }}
    image: {{ include "select-moe.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [python, -m, pipelines.install]
    args:
      {{- .args | nindent 6 }}
    {{- with list (include "select-moe.caEnv" .root) .env | join "\n" | trim }}
    env:
      {{- . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "select-moe.securityContext" .root | nindent 6 }}
    resources:
      {{- toYaml $hooks.resources | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- with list (include "select-moe.caMount" .root) .mounts | join "\n" | trim }}
      {{- . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: 1Gi
  {{- with list (include "select-moe.caVolume" .root) .volumes | join "\n" | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{/*
How long and how often a Job is tried. Exit code 2 is a mistake in the values, which no second try mends; a pod that its
node lost is no failure. Takes (dict "root" $ "deadline" SECONDS).
*/}}
{{- define "select-moe.jobLimits" -}}
activeDeadlineSeconds: {{ .deadline }}
backoffLimit: {{ .root.Values.hooks.backoffLimit }}
ttlSecondsAfterFinished: {{ .root.Values.hooks.ttlSecondsAfterFinished }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2]
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
{{- end }}
